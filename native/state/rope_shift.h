// Turning keys that lie in memory to new RoPE positions.
#pragma once

#include "kvp_edge.h"

#include "ggml.h"

#include <cstddef>
#include <cstdint>

namespace kvp {

// Pair i of a head is turned by distance * frequency[i].
struct rope_shift {
    const double *  frequency = nullptr; // [n_layer, n_pairs], radians per position; nullptr: no turning
    const kvp_rope_position * distance  = nullptr; // [n_layer, n_head_kv, n_keep], new position - old one
    uint32_t        n_pairs   = 0;
    bool            neox      = false; // pairs (i, i + n_pairs); else (2i, 2i + 1)
    uint32_t        hadamard_block = 0; // of the rotation that keys are stored under, 0 = none
};

// Throws unless keys of a layer, `row` bytes of n_head heads, can be turned so.
void check_shift(const rope_shift & how, ggml_type type, size_t row, size_t n_head);

// Turns the keys of layer il: n_keep rows of n_head heads. Those that stay where they are keep their bits.
void shift_keys(const rope_shift & how, size_t il, ggml_type type, size_t row, size_t n_head, size_t n_keep, uint8_t * keys);

} // namespace kvp
