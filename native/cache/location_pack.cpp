// Packing a cache where it lies: rows move between cells, and llama.cpp is told afterwards which are free.
#include "cache/location.h"

#include "error.h"
#include "state/slices.h"

#include <algorithm>
#include <cstring>

namespace kvp {

namespace {

struct moves {
    const pack_plan &             plan;
    const std::vector<uint32_t> & survivors; // [n_keep] rows whose cells stay
    const std::vector<kvp_cell_index> & cells;     // [n] of all rows
    row_range                     range;

    uint32_t size() const { return range.last - range.first; }
    uint32_t target(uint32_t i) const { return cells[survivors[i]]; }
    uint32_t source(uint32_t il, size_t head, uint32_t i) const { return cells[row(il, head, i)]; }

    uint32_t row(uint32_t il, size_t head, uint32_t i) const {
        return uint32_t(plan.keep[(size_t(il) * plan.n_head_kv + head) * plan.n_keep + i]);
    }
};

// In memory that the host sees no row is gathered first. Rows ascend: where all of them go to older rows'
// cells, going from the oldest to the newest reads every cell before it is written to; where all go to newer
// ones, going the other way does.
enum class order { oldest_first, newest_first, none };

order safe_order(const moves & m) {
    bool down = true, up = true;
    for (size_t g = 0; g < size_t(m.plan.n_layer) * m.plan.n_head_kv; ++g) {
        for (uint32_t i = m.range.first; i < m.range.last; ++i) {
            const uint32_t row = m.row(uint32_t(g / m.plan.n_head_kv), g % m.plan.n_head_kv, i);
            down               = down && m.survivors[i] <= row;
            up                 = up && m.survivors[i] >= row;
        }
    }
    return down ? order::oldest_first : up ? order::newest_first : order::none;
}

void move_slices(const moves & m, order way, uint32_t il, uint8_t * rows, size_t row) {
    const size_t n_head = m.plan.n_head_kv;
    with_slice_size(row / n_head, [&](auto slice) {
        for (uint32_t step = 0; step < m.size(); ++step) {
            const uint32_t i = way == order::oldest_first ? m.range.first + step : m.range.last - 1 - step;
            uint8_t *      to = rows + m.target(i) * row;
            for (size_t h = 0; h < n_head; ++h) {
                const uint8_t * from = rows + m.source(il, h, i) * row;
                if (from != to) {
                    std::memcpy(to + h * slice, from + h * slice, slice);
                }
            }
        }
    });
}

// The same for transposed V: columns of values of `T`'s size, those of one head side by side.
template <typename T> void move_columns_of(const moves & m, order way, uint32_t il, T * columns, size_t n_cells, size_t n_column) {
    struct run {
        size_t to, from, length; // consecutive cells
    };
    const size_t     n_head = m.plan.n_head_kv, per_head = n_column / n_head;
    std::vector<run> runs;
    for (size_t h = 0; h < n_head; ++h) {
        runs.clear();
        for (uint32_t i = m.range.first; i < m.range.last; ++i) {
            const size_t to = m.target(i), from = m.source(il, h, i);
            if (from == to) {
                continue;
            }
            if (!runs.empty() && runs.back().to + runs.back().length == to && runs.back().from + runs.back().length == from) {
                ++runs.back().length;
            } else {
                runs.push_back({ to, from, 1 });
            }
        }
        if (way == order::newest_first) {
            std::reverse(runs.begin(), runs.end());
        }
        for (size_t j = h * per_head; j < (h + 1) * per_head; ++j) {
            T * at = columns + j * n_cells;
            for (const run & r : runs) {
                if (r.length > 32) {
                    std::memmove(at + r.to, at + r.from, r.length * sizeof(T));
                } else if (r.to < r.from) { // runs are short; calling for each costs more than they do
                    for (size_t i = 0; i < r.length; ++i) {
                        at[r.to + i] = at[r.from + i];
                    }
                } else {
                    for (size_t i = r.length; i-- > 0;) {
                        at[r.to + i] = at[r.from + i];
                    }
                }
            }
        }
    }
}

void move_columns(const moves & m, order way, uint32_t il, const layer_rows & layer) {
    const size_t value = ggml_type_size(layer.type_v), n_cells = layer.v_column / value, n_column = layer.v_row / value;
    auto *       v     = const_cast<uint8_t *>(layer.v); // aligned, as ggml's tensors are
    if (value == sizeof(uint16_t)) {
        move_columns_of(m, way, il, reinterpret_cast<uint16_t *>(v), n_cells, n_column);
    } else {
        move_columns_of(m, way, il, reinterpret_cast<uint32_t *>(v), n_cells, n_column);
    }
}

// All of it in one graph, which reads every row before it writes any: what is gathered lies in memory of
// the graph's own in between.
struct device_moves {
    std::vector<int32_t> sources; // [layers of the part, n_head_kv, n_move]
    std::vector<int64_t> targets; // [n_move]
    device_graph         graph;

    device_moves(device_part & part, const moves & m, bool v_transposed)
        : sources(part.layers.size() * m.plan.n_head_kv * m.size()), targets(m.size()), graph(*part.on, 16 + 16 * part.layers.size()) {
        const size_t H = m.plan.n_head_kv, n = m.size();
        for (uint32_t i = 0; i < n; ++i) {
            targets[i] = m.target(m.range.first + i);
            for (size_t l = 0; l < part.layers.size(); ++l) {
                for (size_t h = 0; h < H; ++h) {
                    sources[(l * H + h) * n + i] = int32_t(m.source(part.layers[l].il, h, m.range.first + i));
                }
            }
        }
        const int64_t  end  = *std::max_element(m.cells.begin(), m.cells.end()) + int64_t(1);
        ggml_context * ctx  = graph.ctx();
        ggml_tensor *  from = graph.input(GGML_TYPE_I32, int64_t(n), int64_t(H), int64_t(part.layers.size()), sources.data());
        ggml_tensor *  to   = graph.input(GGML_TYPE_I64, int64_t(n), 1, 1, targets.data());
        for (size_t l = 0; l < part.layers.size(); ++l) {
            const device_layer & layer = part.layers[l];
            ggml_tensor *        rows  = ggml_view_2d(ctx, from, int64_t(n), int64_t(H), from->nb[1], l * from->nb[2]);
            const auto           move  = [&](ggml_tensor * table) { // [row, cells], seen as [slice, cells, heads]
                ggml_tensor * heads = ggml_view_3d(ctx, table, table->ne[0] / int64_t(H), table->ne[1], int64_t(H), table->nb[1],
                                                   table->nb[1] / H, 0);
                return ggml_set_rows(ctx, heads, ggml_get_rows(ctx, heads, rows), to);
            };
            graph.compute(move(layer.k_words));
            if (!v_transposed) {
                graph.compute(move(layer.v_words));
                continue;
            }
            // columns become rows, are moved as such, and become columns again
            const int64_t n_column = layer.v->ne[0];
            ggml_tensor * v = ggml_view_2d(ctx, const_cast<ggml_tensor *>(layer.v), end, n_column, size_t(layer.v->ne[1]) * layer.v->nb[0], 0);
            ggml_tensor * table = ggml_cont(ctx, ggml_transpose(ctx, v)); // [n_column, end]
            ggml_tensor * moved = ggml_view_2d(ctx, move(table), n_column, end, table->nb[1], 0);
            graph.compute(ggml_cpy(ctx, ggml_transpose(ctx, moved), v));
        }
        graph.prepare();
    }
};

} // namespace

bool location::can_pack() const {
    for (const device_part & part : parts) {
        for (const device_layer & layer : part.layers) {
            if (!layer.k_words || (!shape.v_transposed && !layer.v_words)) {
                return false;
            }
        }
    }
    return true;
}

// The graphs are made and not run.
void location::try_packing() {
    const std::vector<int32_t>  keep(size_t(shape.n_layer) * shape.n_head_kv, 0);
    const std::vector<uint32_t> at{ 0, 1 }, survivors{ 1 };
    pack_plan                   plan;
    plan.n_layer   = shape.n_layer;
    plan.n_head_kv = shape.n_head_kv;
    plan.n         = 2;
    plan.n_keep    = 1;
    plan.keep      = keep.data();
    const moves m{ plan, survivors, at, { 0, 1 } };
    for (device_part & part : parts) {
        device_moves(part, m, shape.v_transposed != 0);
    }
}

void location::pack(const pack_plan & plan, const std::vector<uint32_t> & survivors, const std::vector<uint32_t> & at) {
    const moves m{ plan, survivors, at, rows_to_move(plan, survivors) };
    if (m.range.first >= m.range.last) {
        return;
    }
    if (!can_pack()) {
        fail(KVP_ERR_UNSUPPORTED, "heads of keys or values are no whole words of %zu bytes", WORD_BYTES);
    }
    const order way = safe_order(m);
    if (way == order::none) {
        fail(KVP_ERR_UNSUPPORTED, "rows move both to older and to newer cells");
    }
    std::vector<std::unique_ptr<device_moves>> ready; // all of them, before one changes anything
    for (device_part & part : parts) {
        ready.push_back(std::make_unique<device_moves>(part, m, shape.v_transposed != 0));
    }
    for (const auto & on_device : ready) {
        on_device->graph.run();
    }
    for (uint32_t il = 0; il < host.size(); ++il) {
        if (!on_host(il)) {
            continue;
        }
        const layer_rows & layer = host[il];
        move_slices(m, way, il, const_cast<uint8_t *>(layer.k), layer.k_row);
        if (!shape.v_transposed) {
            move_slices(m, way, il, const_cast<uint8_t *>(layer.v), layer.v_row);
        } else {
            move_columns(m, way, il, layer);
        }
    }
}

} // namespace kvp
