// What packing does: every (layer, KV head) keeps its own rows of a cache, in the same few cells.
//
// Why this is sound: a cached key carries its RoPE rotation already and the attention mask asks only
// whether a cell's position is older than the query, so it does not matter which token's key and value
// lie in which cell, head by head. Not so for ALiBi, whose bias is made from cell positions; opening a
// cache for packing tests it on the model at hand (kvp_cache_check_packing).
#pragma once

#include "kvp_edge.h"
#include "state/rope_shift.h"

#include <cstdint>
#include <vector>

namespace kvp {

struct pack_plan {
    uint32_t        n_layer   = 0;
    uint32_t        n_head_kv = 0;
    uint32_t        n         = 0; // rows now; row r is the cell with the r-th smallest position
    uint32_t        n_keep    = 0;
    const kvp_llama_position * present   = nullptr; // [n], ascending: the positions that the blob must hold
    const kvp_row * keep      = nullptr; // [n_layer, n_head_kv, n_keep]: rows, all different in each head
    const kvp_llama_position * positions = nullptr; // [n_keep], ascending: the new cells' positions; the newest stays
    rope_shift      shift;
};

// Whether every head's rows ascend, as packing a cache in place needs it; a state is packed either way.
// Throws KVP_ERR_ARGUMENT unless rows and positions are possible ones.
bool check_rows(const pack_plan & plan);

// Packing in place: cells keep their positions, so those survive whose positions are named. The rows that lie
// in them now, ascending; empty if the named positions are not all present.
std::vector<uint32_t> surviving_rows(const pack_plan & plan);

// Rows before `first` and from `last` on of what stays are in their cells already, in every head.
struct row_range {
    uint32_t first, last;
};
row_range rows_to_move(const pack_plan & plan, const std::vector<uint32_t> & survivors);

} // namespace kvp
