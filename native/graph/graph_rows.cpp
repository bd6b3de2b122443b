#include "graph/graph_rows.h"

#include "state/rows.h"

#include <algorithm>

namespace kvp {

ggml_tensor * gather(ggml_context * ctx, ggml_tensor * table, ggml_tensor * cells, int64_t head_size, int64_t n_head_kv) {
    ggml_tensor * rows = ggml_get_rows(ctx, table, cells); // [n_head_kv * head_size, n]
    rows               = ggml_reshape_3d(ctx, rows, head_size, n_head_kv, cells->ne[0]);
    return ggml_cont(ctx, ggml_permute(ctx, rows, 0, 2, 1, 3));
}

ggml_tensor * as_rows(ggml_context * ctx, ggml_tensor * v, int64_t end) {
    ggml_tensor * columns = ggml_view_2d(ctx, v, end, v->ne[0], size_t(v->ne[1]) * v->nb[0], 0);
    return ggml_cont(ctx, ggml_transpose(ctx, columns));
}

graph_rows::graph_rows(device_graph & graph, const device_part & part, const kvp_cache_shape & shape, const std::vector<int32_t> & cells)
    : graph(graph), part(part), shape(shape), end(*std::max_element(cells.begin(), cells.end()) + int64_t(1)),
      from(graph.input(GGML_TYPE_I32, int64_t(cells.size()), 1, 1, cells.data())), k{ shape.k_hadamard_block, {} }, v{ shape.v_hadamard_block, {} } {}

ggml_tensor * graph_rows::undo(hadamard_side & side, ggml_tensor * rows) {
    if (side.block == 0) {
        return rows;
    }
    if (!side.matrix) {
        side.numbers.resize(size_t(side.block) * side.block);
        for (size_t i = 0; i < side.block; ++i) {
            side.numbers[i * side.block + i] = 1.0f;
        }
        hadamard(side.numbers.data(), side.numbers.size(), side.block);
        side.matrix = graph.input(GGML_TYPE_F32, side.block, side.block, 1, side.numbers.data());
    }
    ggml_tensor * blocks = ggml_reshape_2d(graph.ctx(), rows, side.block, ggml_nelements(rows) / side.block);
    return ggml_reshape_3d(graph.ctx(), mul_mat_f32(graph.ctx(), side.matrix, blocks), rows->ne[0], rows->ne[1], rows->ne[2]);
}

ggml_tensor * graph_rows::stored_keys(size_t l) {
    auto * table = const_cast<ggml_tensor *>(part.layers[l].k);
    return gather(graph.ctx(), table, from, shape.head_size_k, shape.n_head_kv);
}

ggml_tensor * graph_rows::keys(size_t l) { return undo(k, stored_keys(l)); }

ggml_tensor * graph_rows::values(size_t l) {
    auto *        table = const_cast<ggml_tensor *>(part.layers[l].v);
    ggml_tensor * rows  = shape.v_transposed ? as_rows(graph.ctx(), table, end) : table;
    return undo(v, gather(graph.ctx(), rows, from, shape.head_size_v, shape.n_head_kv));
}

} // namespace kvp
