#include "state/pack_state.h"

#include "error.h"
#include "state/rows.h"
#include "state/slices.h"
#include "state/state_blob.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <tuple>
#include <vector>

namespace kvp {

namespace {

// Writes forward through the blob it was read from. Invariant: what is still to be read lies at or
// behind the cursor, because packing only ever shrinks what came before.
class writer {
public:
    explicit writer(uint8_t * at) : cur(at) {}

    template <typename T> void put(T value) {
        std::memcpy(cur, &value, sizeof(T));
        cur += sizeof(T);
    }

    uint8_t * cur;
};

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

// Types that llama.cpp offers for a KV cache and that can be written without further data.
bool keys_can_be_shifted(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32:
        case GGML_TYPE_F16:
        case GGML_TYPE_BF16:
        case GGML_TYPE_Q8_0:
        case GGML_TYPE_Q5_1:
        case GGML_TYPE_Q5_0:
        case GGML_TYPE_Q4_1:
        case GGML_TYPE_Q4_0:
        case GGML_TYPE_IQ4_NL: return true;
        default: return false;
    }
}

void check_plan(const state_blob & state, const pack_plan & plan, std::vector<uint32_t> & order) {
    check_rows(plan);
    const blob_cache & base = state.base;
    if (base.pos.size() != plan.n || base.layers.size() != plan.n_layer) {
        fail(KVP_ERR_ARGUMENT, "the cache holds %zu tokens in %zu layers, not %u in %u: the table of kept tokens is out of date",
             base.pos.size(), base.layers.size(), plan.n, plan.n_layer);
    }
    order.resize(plan.n);
    std::iota(order.begin(), order.end(), 0u);
    if (!std::is_sorted(base.pos.begin(), base.pos.end())) {
        std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return base.pos[a] < base.pos[b]; });
    }
    for (uint32_t i = 0; i < plan.n; ++i) {
        if (base.pos[order[i]] != plan.present[i]) {
            fail(KVP_ERR_ARGUMENT, "row %u of the cache is at position %d, not %d: the table of kept tokens is out of date", i,
                 base.pos[order[i]], plan.present[i]);
        }
    }
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
            if (!keys_can_be_shifted(layer.type_k)) {
                fail(KVP_ERR_UNSUPPORTED, "keys of type %s cannot be turned to new positions", ggml_type_name(layer.type_k));
            }
            const int64_t head_size = int64_t(layer.k_row / plan.n_head_kv / ggml_type_size(layer.type_k)) * ggml_blck_size(layer.type_k);
            if (!plan.shift.distance || plan.shift.n_pairs == 0 || 2 * int64_t(plan.shift.n_pairs) > head_size ||
                (plan.shift.hadamard_block && head_size % plan.shift.hadamard_block != 0)) {
                fail(KVP_ERR_ARGUMENT, "%u pairs cannot be turned in keys of %lld values", plan.shift.n_pairs, (long long) head_size);
            }
        }
    }
}

// n values (whole blocks) of any ggml type to f32 and back. The typed side may be unaligned, as blobs are.
void to_float(ggml_type type, const uint8_t * src, size_t n, float * out, std::vector<uint8_t> & aligned) {
    aligned.assign(src, src + ggml_row_size(type, (int64_t) n));
    if (type == GGML_TYPE_F32) {
        std::memcpy(out, aligned.data(), aligned.size());
        return;
    }
    const ggml_to_float_t convert = ggml_get_type_traits(type)->to_float;
    if (!convert) {
        fail(KVP_ERR_UNSUPPORTED, "a cache of type %s cannot be read back", ggml_type_name(type));
    }
    convert(aligned.data(), out, (int64_t) n);
}

void from_float(ggml_type type, const float * src, size_t n, uint8_t * out, std::vector<uint8_t> & aligned) {
    aligned.resize(ggml_row_size(type, (int64_t) n));
    ggml_quantize_chunk(type, src, aligned.data(), 0, 1, (int64_t) n, nullptr);
    std::memcpy(out, aligned.data(), aligned.size());
}

// Turns keys of one layer, n_keep rows of n_head heads. Those that stay where they are keep their bits.
void shift_keys(const rope_shift & how, const double * frequency, const kvp_rope_position * distance, ggml_type type,
                size_t row, size_t n_head, size_t n_keep, uint8_t * keys) {
    const size_t         slice     = row / n_head;
    const size_t         head_size = slice / ggml_type_size(type) * size_t(ggml_blck_size(type));
    std::vector<float>   k(head_size);
    std::vector<uint8_t> aligned;
    for (size_t h = 0; h < n_head; ++h) {
        for (size_t i = 0; i < n_keep; ++i) {
            const int32_t by = distance[h * n_keep + i];
            if (by == 0) {
                continue;
            }
            uint8_t * at = keys + i * row + h * slice;
            to_float(type, at, head_size, k.data(), aligned);
            if (how.hadamard_block) {
                hadamard(k.data(), head_size, how.hadamard_block);
            }
            for (uint32_t p = 0; p < how.n_pairs; ++p) {
                float &      a     = k[how.neox ? p : 2 * p];
                float &      b     = k[how.neox ? p + how.n_pairs : 2 * p + 1];
                const double angle = by * frequency[p], cos = std::cos(angle), sin = std::sin(angle);
                const double a1 = a * cos - b * sin, b1 = a * sin + b * cos;
                a = float(a1);
                b = float(b1);
            }
            if (how.hadamard_block) {
                hadamard(k.data(), head_size, how.hadamard_block);
            }
            from_float(type, k.data(), head_size, at, aligned);
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

    writer out(blob + 2 * sizeof(uint32_t)); // behind magic and sequence
    out.put<uint32_t>(1);                    // n_stream
    out.put<uint32_t>(plan.n_keep);
    for (uint32_t i = 0; i < plan.n_keep; ++i) {
        out.put<int32_t>(plan.positions[i]);
        out.put<uint32_t>(1);
        out.put<int32_t>(seq_id);
    }
    out.put<uint32_t>(state.base.v_trans);
    out.put<uint32_t>(plan.n_layer);

    const auto cells_of = [&](uint32_t il) {
        const kvp_row * keep = plan.keep + il * per_layer;
        for (size_t i = 0; i < per_layer; ++i) {
            cells[i] = order[keep[i]];
        }
    };
    // Early layers may overlap their own source; then the way leads through the scratch memory.
    const auto through = [&](const uint8_t * src, size_t bytes, auto gather) {
        if (out.cur + bytes <= src) {
            gather(out.cur);
        } else {
            gather(scratch.data());
            std::memcpy(out.cur, scratch.data(), bytes);
        }
        out.cur += bytes;
    };

    for (uint32_t il = 0; il < plan.n_layer; ++il) {
        const layer_rows & layer = state.base.layers[il];
        cells_of(il);
        out.put<int32_t>(layer.type_k);
        out.put<uint64_t>(layer.k_row);
        through(layer.k, layer.k_row * n_keep, [&](uint8_t * dst) {
            gather_rows(layer.k, layer.k_row, cells.data(), n_head, n_keep, dst);
            if (plan.shift.frequency) {
                shift_keys(plan.shift, plan.shift.frequency + size_t(il) * plan.shift.n_pairs,
                          plan.shift.distance + il * per_layer, layer.type_k, layer.k_row, n_head, n_keep, dst);
            }
        });
    }
    for (uint32_t il = 0; il < plan.n_layer; ++il) {
        const layer_rows & layer = state.base.layers[il];
        cells_of(il);
        out.put<int32_t>(layer.type_v);
        if (!state.base.v_trans) {
            out.put<uint64_t>(layer.v_row);
            through(layer.v, layer.v_row * n_keep,
                    [&](uint8_t * dst) { gather_rows(layer.v, layer.v_row, cells.data(), n_head, n_keep, dst); });
            continue;
        }
        const size_t value = ggml_type_size(layer.type_v), n_column = layer.v_row / value;
        out.put<uint32_t>(uint32_t(value));
        out.put<uint32_t>(uint32_t(n_column));
        through(layer.v, layer.v_row * n_keep, [&](uint8_t * dst) {
            switch (value) {
                case 1: return gather_columns<uint8_t>(layer.v, plan.n, cells.data(), n_column, n_head, n_keep, dst);
                case 2: return gather_columns<uint16_t>(layer.v, plan.n, cells.data(), n_column, n_head, n_keep, dst);
                case 4: return gather_columns<uint32_t>(layer.v, plan.n, cells.data(), n_column, n_head, n_keep, dst);
                default: return gather_columns<uint64_t>(layer.v, plan.n, cells.data(), n_column, n_head, n_keep, dst);
            }
        });
    }
    if (state.has_window) {
        std::memmove(out.cur, state.window_bytes, state.window_size);
        out.cur += state.window_size;
    }
    return size_t(out.cur - blob);
}

} // namespace kvp
