// Rows of the cache inside graphs, on the device where they lie.
#pragma once

#include "graph/device_part.h"
#include "kvp_edge.h"

namespace kvp {

// f32 [head_size, n, n_head_kv] of the n rows in `cells`, as they are stored: still in the Hadamard rotation.
ggml_tensor * gather(ggml_context * ctx, ggml_tensor * table, ggml_tensor * cells, int64_t head_size, int64_t n_head_kv);

// [n_column, cells before `end`] of values that are stored column by column.
ggml_tensor * as_rows(ggml_context * ctx, ggml_tensor * v, int64_t end);

// The rows of some tokens in the layers of one part.
class graph_rows {
public:
    // `cells` must live until the graph has run, as must this.
    graph_rows(device_graph & graph, const device_part & part, const kvp_cache_shape & shape, const std::vector<int32_t> & cells);

    // f32 [head_size, n, n_head_kv] of the part's layer number l: as they are stored, or as the model made them.
    ggml_tensor * stored_keys(size_t l);
    ggml_tensor * keys(size_t l);
    ggml_tensor * values(size_t l);

private:
    // Undoes the rotation of one side. Its matrix is its own inverse, and an input once it is needed.
    struct hadamard_side {
        uint32_t           block;
        std::vector<float> numbers;
        ggml_tensor *      matrix = nullptr;
    };
    ggml_tensor * undo(hadamard_side & side, ggml_tensor * rows);

    device_graph &          graph;
    const device_part &     part;
    const kvp_cache_shape & shape;
    int64_t                 end; // of the cells
    ggml_tensor *           from;
    hadamard_side           k, v;
};

} // namespace kvp
