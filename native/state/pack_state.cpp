#include "state/pack_state.h"

#include "error.h"
#include "state/blob_writer.h"
#include "state/rope_shift.h"
#include "state/slices.h"
#include "state/state_blob.h"

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

namespace kvp {

namespace {

// [n_head_kv, n_keep] cells of one layer -> n_keep rows in which every head has its own slice.
void gather_rows(const uint8_t * src, size_t row, const uint32_t * cells, size_t n_head, size_t n_keep, uint8_t * dst) {
    with_slice_size(row / n_head, [=](auto slice) {
        for (size_t i = 0; i < n_keep; ++i) {
            for (size_t h = 0; h < n_head; ++h) {
                std::memcpy(dst + i * row + h * slice, src + cells[h * n_keep + i] * row + h * slice, slice);
            }
        }
    });
}

// The same for transposed V: n_column columns of n values of `T`'s size, those of one head side by side.
template <typename T>
void gather_columns(const uint8_t * src, size_t n, const uint32_t * cells, size_t n_column, size_t n_head,
                    size_t n_keep, uint8_t * dst) {
    struct run {
        uint32_t from, length; // consecutive cells
    };
    constexpr size_t CHUNK    = 16; // bytes; copied whole, what is too much is overwritten by what follows
    const size_t     per_head = n_column / n_head;
    std::vector<run> runs;
    for (size_t h = 0; h < n_head; ++h) {
        const uint32_t * cell = cells + h * n_keep;
        runs.clear();
        for (size_t i = 0; i < n_keep; ++i) {
            if (i > 0 && cell[i] == cell[i - 1] + 1) {
                ++runs.back().length;
            } else {
                runs.push_back({ cell[i], 1 });
            }
        }
        for (size_t j = h * per_head; j < (h + 1) * per_head; ++j) {
            const uint8_t * from = src + j * n * sizeof(T);
            uint8_t *       to   = dst + j * n_keep * sizeof(T);
            // a chunk may reach into the columns that follow, but never behind the last one
            const bool chunks = (n_column - 1 - j) * n_keep * sizeof(T) >= CHUNK;
            for (const run & r : runs) {
                const uint8_t * piece = from + r.from * sizeof(T);
                const size_t    bytes = r.length * sizeof(T);
                if (chunks) {
                    for (size_t at = 0; at < bytes; at += CHUNK) {
                        std::memcpy(to + at, piece + at, CHUNK);
                    }
                } else {
                    std::memcpy(to, piece, bytes);
                }
                to += bytes;
            }
        }
    }
}

void check_plan(const state_blob & state, const pack_plan & plan, std::vector<uint32_t> & order) {
    check_rows(plan);
    const blob_cache & base = state.base;
    if (base.pos.size() != plan.n || base.layers.size() != plan.n_layer) {
        fail(KVP_ERR_ARGUMENT, "the cache holds %zu tokens in %zu layers, not %u in %u: the table of kept tokens is out of date",
             base.pos.size(), base.layers.size(), plan.n, plan.n_layer);
    }
    order = cells_in_order(base, plan.present, plan.n);
    for (const layer_rows & layer : base.layers) {
        for (const auto & [side, type, row] : { std::tuple{ "K", layer.type_k, layer.k_row }, { "V", layer.type_v, layer.v_row } }) {
            if (row % plan.n_head_kv != 0 || row / plan.n_head_kv % ggml_type_size(type) != 0) {
                fail(KVP_ERR_UNSUPPORTED,
                     "per-head eviction needs KV heads that are whole blocks of the cache's type: %zu bytes of %s in %u heads of "
                     "type %s are not. Use an f16 cache, or granularity='token'.",
                     row, side, plan.n_head_kv, ggml_type_name(type));
            }
        }
    }
    if (plan.shift.frequency) {
        for (const layer_rows & layer : base.layers) {
            check_shift(plan.shift, layer.type_k, layer.k_row, plan.n_head_kv);
        }
    }
}

} // namespace

size_t pack_state(uint8_t * blob, size_t size, int32_t seq_id, const pack_plan & plan) {
    const state_blob      state = parse_state_blob(blob, size, seq_id);
    std::vector<uint32_t> order;
    check_plan(state, plan, order);

    const size_t          n_head = plan.n_head_kv, n_keep = plan.n_keep, per_layer = n_head * n_keep;
    size_t                largest = 0;
    std::vector<kvp_cell_index> cells(per_layer);
    for (const layer_rows & layer : state.base.layers) {
        largest = std::max({ largest, layer.k_row * n_keep, layer.v_row * n_keep });
    }
    std::vector<uint8_t> scratch(largest);

    blob_writer out(blob + 2 * sizeof(uint32_t)); // behind magic and sequence
    const auto cells_of = [&](size_t il) {
        const kvp_row * keep = plan.keep + il * per_layer;
        for (size_t i = 0; i < per_layer; ++i) {
            cells[i] = order[keep[i]];
        }
    };
    // What is still to be read lies at or behind the place that is written to, because packing only ever shrinks what
    // came before. Early layers may overlap their own source; then the way leads through the scratch memory.
    const auto through = [&](const uint8_t * src, size_t bytes, uint8_t * dst, auto gather) {
        if (dst + bytes <= src) {
            gather(dst);
        } else {
            gather(scratch.data());
            std::memcpy(dst, scratch.data(), bytes);
        }
    };
    const auto put_k = [&](size_t il, uint8_t * at) {
        const layer_rows & layer = state.base.layers[il];
        cells_of(il);
        through(layer.k, layer.k_row * n_keep, at, [&](uint8_t * dst) {
            gather_rows(layer.k, layer.k_row, cells.data(), n_head, n_keep, dst);
            if (plan.shift.frequency) {
                shift_keys(plan.shift, il, layer.type_k, layer.k_row, n_head, n_keep, dst);
            }
        });
    };
    const auto put_v = [&](size_t il, uint8_t * at) {
        const layer_rows & layer = state.base.layers[il];
        cells_of(il);
        through(layer.v, layer.v_row * n_keep, at, [&](uint8_t * dst) {
            if (!state.base.v_trans) {
                return gather_rows(layer.v, layer.v_row, cells.data(), n_head, n_keep, dst);
            }
            const size_t value = ggml_type_size(layer.type_v), n_column = layer.v_row / value;
            switch (value) {
                case 1: return gather_columns<uint8_t>(layer.v, plan.n, cells.data(), n_column, n_head, n_keep, dst);
                case 2: return gather_columns<uint16_t>(layer.v, plan.n, cells.data(), n_column, n_head, n_keep, dst);
                case 4: return gather_columns<uint32_t>(layer.v, plan.n, cells.data(), n_column, n_head, n_keep, dst);
                default: return gather_columns<uint64_t>(layer.v, plan.n, cells.data(), n_column, n_head, n_keep, dst);
            }
        });
    };
    out.put_cache(seq_id, plan.positions, n_keep, state.base.v_trans, state.base.layers, put_k, put_v);
    if (state.has_window) {
        out.put(state.window_bytes, state.window_size);
    }
    return size_t(out.cur - blob);
}

} // namespace kvp
