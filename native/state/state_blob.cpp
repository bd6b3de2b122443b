#include "state/state_blob.h"

#include "error.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace kvp {

namespace {

constexpr uint32_t STATE_MAGIC = 0xaf143cd8; // io_magic in src/llama-context.cpp

class reader {
public:
    reader(const uint8_t * data, size_t size) : cur(data), end(data + size) {}

    template <typename T> T read(const char * what) {
        T value;
        std::memcpy(&value, take(sizeof(T), what), sizeof(T));
        return value;
    }

    // `count` items of `bytes` each. Division instead of multiplication: a hostile count cannot overflow.
    const uint8_t * take(uint64_t count, uint64_t bytes, const char * what) {
        if (bytes != 0 && count > left() / bytes) {
            fail(KVP_ERR_LAYOUT,
                 "llama.cpp's state blob ends inside %s (%llu x %llu bytes wanted, %zu left): its layout is not the one "
                 "this version of kvp_edge knows",
                 what, (unsigned long long) count, (unsigned long long) bytes, left());
        }
        const uint8_t * p = cur;
        cur += count * bytes;
        return p;
    }
    const uint8_t * take(uint64_t bytes, const char * what) { return take(1, bytes, what); }

    size_t left() const { return size_t(end - cur); }

private:
    const uint8_t * cur;
    const uint8_t * end;
};

[[noreturn]] void unknown(const char * what, long long found) {
    fail(KVP_ERR_LAYOUT, "llama.cpp's state blob has %s = %lld: its layout is not the one this version of kvp_edge knows",
         what, found);
}

ggml_type read_type(reader & in, const char * what) {
    const int32_t type = in.read<int32_t>(what);
    if (type < 0 || type >= GGML_TYPE_COUNT || ggml_blck_size(ggml_type(type)) == 0) {
        unknown(what, type);
    }
    return ggml_type(type);
}

// A row holds whole blocks of its type, and at least one.
size_t check_row(ggml_type type, uint64_t bytes, const char * what) {
    if (bytes == 0 || bytes % ggml_type_size(type) != 0) {
        unknown(what, (long long) bytes);
    }
    return size_t(bytes);
}

blob_cache parse_cache(reader & in, int32_t seq_id) {
    blob_cache cache;

    const uint32_t n_stream = in.read<uint32_t>("n_stream");
    if (n_stream != 1) {
        unknown("n_stream", n_stream);
    }
    const uint32_t n_cells = in.read<uint32_t>("the cell count");
    if (n_cells == 0) {
        return cache;
    }

    // 12 bytes a cell when cells carry nothing but a position (no 2D positions, no token ids)
    if (n_cells > in.left() / 12) {
        unknown("the cell count", n_cells);
    }
    cache.pos.resize(n_cells);
    for (int32_t & pos : cache.pos) {
        pos                     = in.read<int32_t>("a cell's position");
        const uint32_t n_seq_id = in.read<uint32_t>("a cell's sequence count");
        if (pos < 0) {
            unknown("a cell's position", pos);
        }
        if (n_seq_id != 1) {
            unknown("a cell's sequence count", n_seq_id);
        }
        const int32_t seq = in.read<int32_t>("a cell's sequence");
        if (seq != seq_id) {
            unknown("a cell's sequence", seq);
        }
    }
    std::vector<int32_t> sorted = cache.pos;
    if (!std::is_sorted(sorted.begin(), sorted.end())) { // it is, unless freed cells were filled again
        std::sort(sorted.begin(), sorted.end());
    }
    if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end()) {
        fail(KVP_ERR_LAYOUT, "llama.cpp's state blob names one position for two cells");
    }

    const uint32_t v_trans = in.read<uint32_t>("v_trans");
    if (v_trans > 1) {
        unknown("v_trans", v_trans);
    }
    cache.v_trans          = v_trans == 1;
    const uint32_t n_layer = in.read<uint32_t>("n_layer");
    if (n_layer == 0 || n_layer > KVP_MAX_LAYERS) {
        unknown("n_layer", n_layer);
    }
    cache.layers.resize(n_layer);

    for (layer_rows & layer : cache.layers) {
        layer.type_k = read_type(in, "the type of K");
        layer.k_row  = check_row(layer.type_k, in.read<uint64_t>("the row size of K"), "the row size of K");
        layer.k      = in.take(n_cells, layer.k_row, "the rows of K");
    }
    for (layer_rows & layer : cache.layers) {
        layer.type_v = read_type(in, "the type of V");
        if (!cache.v_trans) {
            layer.v_row = check_row(layer.type_v, in.read<uint64_t>("the row size of V"), "the row size of V");
            layer.v     = in.take(n_cells, layer.v_row, "the rows of V");
        } else {
            const uint32_t value_bytes = in.read<uint32_t>("the value size of V");
            const uint32_t n_embd      = in.read<uint32_t>("the width of V");
            // llama.cpp refuses a quantised V without flash attention, so a column holds plain values
            if (ggml_blck_size(layer.type_v) != 1 || value_bytes != ggml_type_size(layer.type_v)) {
                unknown("the value size of V", value_bytes);
            }
            if (n_embd == 0) {
                unknown("the width of V", n_embd);
            }
            layer.v_row    = size_t(n_embd) * value_bytes;
            layer.v_column = size_t(n_cells) * value_bytes;
            layer.v     = in.take(n_cells, layer.v_row, "the columns of V");
        }
    }
    return cache;
}

} // namespace

state_blob parse_state_blob(const uint8_t * data, size_t size, int32_t seq_id) {
    reader in(data, size);

    const uint32_t magic = in.read<uint32_t>("the magic number");
    if (magic != STATE_MAGIC) {
        unknown("the magic number", magic);
    }
    const int32_t seq = in.read<int32_t>("the sequence");
    if (seq != seq_id) {
        unknown("the sequence", seq);
    }

    state_blob blob;
    blob.base = parse_cache(in, seq_id);
    if (in.left() > 0) {
        blob.has_window   = true;
        blob.window_size  = in.left();
        blob.window_bytes = data + (size - in.left());
        blob.window       = parse_cache(in, seq_id);
    }
    if (in.left() > 0) {
        fail(KVP_ERR_LAYOUT,
             "llama.cpp's state blob has %zu bytes after the last cache: its layout is not the one this version of kvp_edge "
             "knows",
             in.left());
    }
    return blob;
}

std::vector<kvp_cell_index> cells_in_order(const blob_cache & cache, const kvp_llama_position * present, uint32_t n) {
    if (cache.pos.size() != n) {
        fail(KVP_ERR_ARGUMENT, "the cache holds %zu tokens, not %u: the table of kept tokens is out of date", cache.pos.size(), n);
    }
    std::vector<kvp_cell_index> order(n);
    std::iota(order.begin(), order.end(), 0u);
    if (!std::is_sorted(cache.pos.begin(), cache.pos.end())) {
        std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return cache.pos[a] < cache.pos[b]; });
    }
    for (uint32_t i = 0; i < n; ++i) {
        if (cache.pos[order[i]] != present[i]) {
            fail(KVP_ERR_ARGUMENT, "row %u of the cache is at position %d, not %d: the table of kept tokens is out of date", i,
                 cache.pos[order[i]], present[i]);
        }
    }
    return order;
}

} // namespace kvp
