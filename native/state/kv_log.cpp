#include "state/kv_log.h"

#include "error.h"
#include "state/convert.h"
#include "state/rows.h"

#include <algorithm>
#include <cstring>
#include <tuple>

namespace kvp {

namespace {

// Whether values of a type can be read and written, so that rows are converted to it and back.
bool can_be_converted(ggml_type type) {
    return can_be_written(type) && (type == GGML_TYPE_F32 || ggml_get_type_traits(type)->to_float);
}

// The rows of cells `order` of transposed V: columns of values of `T`'s size.
template <typename T>
void rows_of_columns(const layer_rows & layer, const std::vector<kvp_cell_index> & order, uint8_t * out) {
    const size_t n_column = layer.v_row / sizeof(T);
    for (size_t j = 0; j < n_column; ++j) {
        const uint8_t * column = layer.v + j * layer.v_column;
        for (size_t i = 0; i < order.size(); ++i) {
            std::memcpy(out + i * layer.v_row + j * sizeof(T), column + order[i] * sizeof(T), sizeof(T));
        }
    }
}

void copy_rows(const uint8_t * rows, size_t row, const std::vector<kvp_cell_index> & order, uint8_t * out) {
    for (size_t i = 0; i < order.size(); ++i) {
        std::memcpy(out + i * row, rows + order[i] * row, row);
    }
}

} // namespace

kvp_log_layout log_layout_of(const kvp_cache_shape & cache, int32_t type) {
    if (type < -1 || type >= GGML_TYPE_COUNT || (type >= 0 && ggml_blck_size(ggml_type(type)) == 0)) {
        fail(KVP_ERR_ARGUMENT, "%d is no type of ggml's, and not -1 for the cache's own types", type);
    }
    kvp_log_layout log{};
    log.n_layer          = cache.n_layer;
    log.n_head_kv        = cache.n_head_kv;
    log.head_size_k      = cache.head_size_k;
    log.head_size_v      = cache.head_size_v;
    log.type_k           = type < 0 ? cache.type_k : type;
    log.type_v           = type < 0 ? cache.type_v : type;
    log.k_hadamard_block = cache.k_hadamard_block;
    log.v_hadamard_block = cache.v_hadamard_block;
    const auto row = [&](const char * name, int32_t of_cache, int32_t of_log, uint32_t head_size) -> uint64_t {
        for (const int32_t each : { of_log, of_cache }) {
            if (head_size % ggml_blck_size(ggml_type(each)) != 0) {
                fail(KVP_ERR_UNSUPPORTED,
                     "a KV log needs KV heads that are whole blocks of its type and of the cache's: %u values of %s are not, in "
                     "type %s. Use type f16.",
                     head_size, name, ggml_type_name(ggml_type(each)));
            }
            if (of_log != of_cache && !can_be_converted(ggml_type(each))) {
                fail(KVP_ERR_UNSUPPORTED, "a KV log of type %s needs rows of %s converted to type %s, which is not possible. Use the "
                     "cache's own types.",
                     ggml_type_name(ggml_type(of_log)), name, ggml_type_name(ggml_type(each)));
            }
        }
        return ggml_row_size(ggml_type(of_log), int64_t(head_size)) * cache.n_head_kv;
    };
    log.k_row           = row("K", cache.type_k, log.type_k, cache.head_size_k);
    log.v_row           = row("V", cache.type_v, log.type_v, cache.head_size_v);
    log.bytes_per_token = log.n_layer * (log.k_row + log.v_row);
    return log;
}

void check_log_layout(const kvp_log_layout & log, const kvp_cache_shape & cache) {
    const bool own = log.type_k == cache.type_k && log.type_v == cache.type_v;
    if (!own && log.type_k != log.type_v) {
        fail(KVP_ERR_ARGUMENT, "a KV log has the cache's types or one type for both K and V, not types %d and %d", log.type_k,
             log.type_v);
    }
    if (!own && log.type_k < 0) {
        fail(KVP_ERR_ARGUMENT, "a KV log has no rows of type %d", log.type_k);
    }
    const kvp_log_layout want   = log_layout_of(cache, own ? -1 : log.type_k);
    const auto           fields = [](const kvp_log_layout & of) {
        return std::make_tuple(of.n_layer, of.n_head_kv, of.head_size_k, of.head_size_v, of.type_k, of.type_v, of.k_hadamard_block,
                               of.v_hadamard_block, of.k_row, of.v_row, of.bytes_per_token);
    };
    if (fields(log) != fields(want)) {
        fail(KVP_ERR_ARGUMENT,
             "the KV log is of another cache: %u layers of %u KV heads, %llu bytes a token, Hadamard blocks %u and %u; this "
             "cache's has %u layers of %u, %llu bytes, blocks %u and %u",
             log.n_layer, log.n_head_kv, (unsigned long long) log.bytes_per_token, log.k_hadamard_block, log.v_hadamard_block,
             want.n_layer, want.n_head_kv, (unsigned long long) want.bytes_per_token, want.k_hadamard_block, want.v_hadamard_block);
    }
}

void write_to_log(const kvp_log_layout & log, uint32_t il, const layer_rows & layer, bool v_trans,
                  const std::vector<kvp_cell_index> & order, uint8_t * block) {
    const size_t         n = order.size();
    uint8_t * const      k = block + il * n * (log.k_row + log.v_row);
    uint8_t * const      v = k + n * log.k_row;
    std::vector<float>   values;
    std::vector<uint8_t> aligned;
    if (layer.type_k == log.type_k) {
        copy_rows(layer.k, layer.k_row, order, k);
    } else {
        const size_t width = size_t(log.n_head_kv) * log.head_size_k;
        values.resize(n * width);
        read_k(layer, order, width, 0, values.data());
        from_float(ggml_type(log.type_k), values.data(), values.size(), k, aligned);
    }
    if (layer.type_v != log.type_v) {
        const size_t width = size_t(log.n_head_kv) * log.head_size_v;
        values.resize(n * width);
        read_v(layer, v_trans, order, width, 0, values.data());
        from_float(ggml_type(log.type_v), values.data(), values.size(), v, aligned);
        return;
    }
    if (!v_trans) {
        copy_rows(layer.v, layer.v_row, order, v);
        return;
    }
    switch (ggml_type_size(layer.type_v)) {
        case 1: return rows_of_columns<uint8_t>(layer, order, v);
        case 2: return rows_of_columns<uint16_t>(layer, order, v);
        case 4: return rows_of_columns<uint32_t>(layer, order, v);
        default: return rows_of_columns<uint64_t>(layer, order, v);
    }
}

logged_rows::logged_rows(const kvp_log_layout & log, const kvp_log_block * blocks, uint32_t n_blocks) : log(log), blocks(blocks) {
    for (uint32_t b = 0; b < n_blocks; ++b) {
        const int64_t end = int64_t(blocks[b].first) + blocks[b].n;
        if (!blocks[b].rows || blocks[b].n == 0 || blocks[b].first < (b > 0 ? ends.back() : 0) || end > INT32_MAX) {
            fail(KVP_ERR_ARGUMENT, "block %u of the KV log, tokens %d to %lld, has no rows, or does not follow the one before", b,
                 blocks[b].first, (long long) end - 1);
        }
        ends.push_back(end);
        first_number.push_back(n_rows);
        n_rows += blocks[b].n;
    }
}

size_t logged_rows::next_block(kvp_token_index token) const {
    return size_t(std::upper_bound(ends.begin(), ends.end(), int64_t(token)) - ends.begin());
}

} // namespace kvp
