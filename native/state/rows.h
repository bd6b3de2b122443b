// Cache rows back to plain floats: de-quantised, and without the Hadamard rotation that llama.cpp
// applies to quantised caches.
#pragma once

#include "state/state_blob.h"

namespace kvp {

// Block sizes of the rotation; 0 where a side is stored as it is.
struct hadamard_blocks {
    uint32_t k = 0;
    uint32_t v = 0;
};

// The rule of llama_kv_cache's constructor (attn_rot_k, attn_rot_v) and of build_input_{k,v}_rot in
// src/llama-kv-cache.cpp: quantised types with a head size that 64 divides; K in the largest
// power-of-two block that divides the head, V in blocks of 64; off with LLAMA_ATTN_ROT_DISABLE=1.
hadamard_blocks hadamard_blocks_of(ggml_type type_k, ggml_type type_v, uint32_t head_size_k, uint32_t head_size_v);

// y <- H y in blocks of `block` values, H the orthonormal Sylvester matrix, which is its own inverse.
void hadamard(float * y, size_t n, uint32_t block);

// The rows of one layer in the order asked for: out[i] = row of cell order[i], f32 [n, n_values], where cells
// are counted as they lie there; n_values = n_head_kv * head_size. Throws KVP_ERR_LAYOUT when a row does not hold n_values values.
void read_k(const layer_rows & layer, const std::vector<uint32_t> & order, size_t n_values, uint32_t hadamard_block, float * out);
void read_v(const layer_rows & layer, bool v_trans, const std::vector<uint32_t> & order, size_t n_values, uint32_t hadamard_block,
            float * out);

} // namespace kvp
