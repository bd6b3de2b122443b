// The layout of what llama_state_seq_get_data writes for one sequence of one KV cache
// (llama_kv_cache::state_write in src/llama-kv-cache.cpp of llama.cpp). Nothing promises this layout
// across versions, so parsing checks every magic number, type, size and sum before a row is believed.
//
//   u32 magic, i32 seq_id                                        written once, by llama_context
//   then for the base cache, and again for the window cache of models with sliding-window layers:
//     u32 n_stream = 1
//     u32 n_cells;  nothing more when it is 0
//     n_cells x { i32 pos, u32 n_seq_id = 1, i32 seq_id }
//     u32 v_trans, u32 n_layer
//     n_layer x { i32 type_k, u64 row_bytes, n_cells rows }
//     v_trans = 0:  n_layer x { i32 type_v, u64 row_bytes, n_cells rows }
//     v_trans = 1:  n_layer x { i32 type_v, u32 value_bytes, u32 n_embd_v, n_embd_v columns of n_cells values }
#pragma once

#include "kvp_edge.h"

#include "ggml.h"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvp {

// One layer's keys and values, in a blob or in the cache itself. Pointers borrow and may be unaligned.
struct layer_rows {
    ggml_type       type_k   = GGML_TYPE_COUNT;
    ggml_type       type_v   = GGML_TYPE_COUNT;
    size_t          k_row    = 0; // bytes of one cell's K over all KV heads
    size_t          v_row    = 0; // likewise V; with v_trans it is n_embd_v * sizeof(value), never contiguous
    size_t          v_column = 0; // with v_trans, bytes from one column to the next
    const uint8_t * k        = nullptr;
    const uint8_t * v        = nullptr;
};

struct blob_cache {
    bool                    v_trans = false;
    std::vector<int32_t>    pos;    // [n_cells], in cell order, all different
    std::vector<layer_rows> layers; // empty when there are no cells
};

struct state_blob {
    blob_cache      base;
    bool            has_window = false;
    blob_cache      window;
    const uint8_t * window_bytes = nullptr; // the window cache as it lies in the blob, up to its end
    size_t          window_size  = 0;
};

// Throws kvp::error (KVP_ERR_LAYOUT) when anything does not add up. The result borrows from `data`.
state_blob parse_state_blob(const uint8_t * data, size_t size, int32_t seq_id);

// The cell of each row: of the n tokens at positions `present`, ascending. Throws KVP_ERR_ARGUMENT unless these are all
// that the cache holds.
std::vector<kvp_cell_index> cells_in_order(const blob_cache & cache, const kvp_llama_position * present, uint32_t n);

} // namespace kvp
