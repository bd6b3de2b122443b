#include "state/fill_state.h"

#include "error.h"
#include "state/blob_writer.h"
#include "state/slices.h"
#include "state/state_blob.h"

#include <algorithm>
#include <cstring>

namespace kvp {

namespace {

constexpr size_t HEADER = 2 * sizeof(uint32_t); // magic and sequence

// The layers of the new base cache: those of the present one, which has none while it is empty.
std::vector<layer_rows> layers_of(const blob_cache & base, const kvp_cache_shape & cache) {
    layer_rows like;
    like.type_k = ggml_type(cache.type_k);
    like.type_v = ggml_type(cache.type_v);
    like.k_row  = ggml_row_size(like.type_k, cache.head_size_k) * cache.n_head_kv;
    like.v_row  = ggml_row_size(like.type_v, cache.head_size_v) * cache.n_head_kv;
    if (base.layers.empty()) {
        return std::vector<layer_rows>(cache.n_layer, like);
    }
    const auto same = [&](const layer_rows & layer) {
        return layer.type_k == like.type_k && layer.type_v == like.type_v && layer.k_row == like.k_row && layer.v_row == like.v_row;
    };
    if (base.layers.size() != cache.n_layer || base.v_trans != (cache.v_transposed != 0) ||
        !std::all_of(base.layers.begin(), base.layers.end(), same)) {
        fail(KVP_ERR_LAYOUT, "llama.cpp's state blob has other rows than when the cache was opened");
    }
    return base.layers;
}

// Slices [n_head, n] -> n rows.
void gather_slices(const std::vector<slice_at> & slices, size_t row, size_t n_head, size_t n, uint8_t * dst) {
    with_slice_size(row / n_head, [&](auto slice) {
        for (size_t h = 0; h < n_head; ++h) {
            for (size_t i = 0; i < n; ++i) {
                std::memcpy(dst + i * row + h * slice, slices[h * n + i].at, slice);
            }
        }
    });
}

// Slices [n_head, n] -> columns of n values of `T`'s size, those of one head side by side.
template <typename T> void gather_columns(const std::vector<slice_at> & slices, size_t n_column, size_t n_head, size_t n, uint8_t * dst) {
    const size_t per_head = n_column / n_head;
    for (size_t h = 0; h < n_head; ++h) {
        const slice_at * from = slices.data() + h * n;
        for (size_t j = 0; j < per_head; ++j) {
            for (size_t i = 0; i < n; ++i, dst += sizeof(T)) {
                std::memcpy(dst, from[i].at + j * from[i].step, sizeof(T));
            }
        }
    }
}

} // namespace

new_state fill_state(const uint8_t * blob, size_t size, int32_t seq_id, const fill_plan & plan, fill_sources & sources) {
    const state_blob state  = parse_state_blob(blob, size, seq_id);
    const auto       cells  = cells_in_order(state.base, plan.present, plan.n);
    const auto       layers = layers_of(state.base, plan.cache);
    const size_t     n_head = plan.cache.n_head_kv, n = plan.n_new;
    const bool       columns = plan.cache.v_transposed != 0;

    new_state made;
    size_t    bound = HEADER + 16 + 12 * n + state.window_size; // counts, cells; and a layer's types and sizes
    for (const layer_rows & layer : layers) {
        bound += 24 + n * (layer.k_row + layer.v_row);
    }
    made.bytes.reset(new uint8_t[bound]);
    blob_writer out(made.bytes.get());
    out.put(blob, HEADER);

    const auto put_k = [&](size_t il, uint8_t * to) {
        gather_slices(sources.slices(side::k, uint32_t(il), layers[il], cells), layers[il].k_row, n_head, n, to);
        if (plan.shift.frequency) {
            shift_keys(plan.shift, il, layers[il].type_k, layers[il].k_row, n_head, n, to);
        }
    };
    const auto put_v = [&](size_t il, uint8_t * to) {
        const layer_rows & layer  = layers[il];
        const auto &       slices = sources.slices(side::v, uint32_t(il), layer, cells);
        if (!columns) {
            return gather_slices(slices, layer.v_row, n_head, n, to);
        }
        const size_t value = ggml_type_size(layer.type_v), n_column = layer.v_row / value;
        switch (value) {
            case 1: return gather_columns<uint8_t>(slices, n_column, n_head, n, to);
            case 2: return gather_columns<uint16_t>(slices, n_column, n_head, n, to);
            case 4: return gather_columns<uint32_t>(slices, n_column, n_head, n, to);
            default: return gather_columns<uint64_t>(slices, n_column, n_head, n, to);
        }
    };
    out.put_cache(seq_id, plan.positions, n, columns, layers, put_k, put_v);
    made.base_size = size_t(out.cur - made.bytes.get());
    if (state.has_window) {
        out.put(state.window_bytes, state.window_size);
    }
    made.size = size_t(out.cur - made.bytes.get());
    return made;
}

new_state with_window(const new_state & made, const state_blob & of) {
    new_state changed;
    changed.base_size = made.base_size;
    changed.size      = made.base_size + of.window_size;
    changed.bytes.reset(new uint8_t[changed.size]);
    blob_writer out(changed.bytes.get());
    out.put(made.bytes.get(), made.base_size);
    out.put(of.window_bytes, of.window_size);
    return changed;
}

} // namespace kvp
