// A KV log's rows in memory (kvp_log_layout, kvp_log_block): laid out, written from a cache's rows, and found again.
#pragma once

#include "kvp_edge.h"
#include "state/state_blob.h"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvp {

// One side of the rows of a cache or a log.
enum class side { k, v };

// The layout of a log of rows of a cache of this shape. type: of both K and V in the log, -1: the cache's own ones.
// Throws KVP_ERR_ARGUMENT for no type at all, and KVP_ERR_UNSUPPORTED where heads are not whole blocks of it, or rows
// cannot be converted to it and back.
kvp_log_layout log_layout_of(const kvp_cache_shape & cache, int32_t type);

// Throws KVP_ERR_ARGUMENT unless log_layout_of() gives this layout for the cache.
void check_log_layout(const kvp_log_layout & log, const kvp_cache_shape & cache);

// Writes layer il of tokens into a block of as many: `order` names their cells in `layer`.
void write_to_log(const kvp_log_layout & log, uint32_t il, const layer_rows & layer, bool v_trans,
                  const std::vector<kvp_cell_index> & order, uint8_t * block);

// Finds rows of a log by their tokens' indices.
class logged_rows {
public:
    // Throws KVP_ERR_ARGUMENT unless blocks ascend, do not overlap, and have rows. Borrows both.
    logged_rows(const kvp_log_layout & log, const kvp_log_block * blocks, uint32_t n_blocks);

    struct place {
        uint32_t block;
        uint32_t row; // in the block
        bool     found;
    };
    place find(kvp_token_index token) const {
        // tokens are asked for in ascending order, most of the time
        if (last >= ends.size() || token < blocks[last].first || token >= ends[last]) {
            last = next_block(token);
        }
        const bool found = last < ends.size() && token >= blocks[last].first;
        return { uint32_t(last), found ? uint32_t(token - blocks[last].first) : 0, found };
    }

    size_t size() const { return n_rows; } // of all blocks
    // A number below size() for each.
    size_t number(const place & at) const { return first_number[at.block] + at.row; }
    // The keys or values of all heads in layer il.
    const uint8_t * row(const place & at, uint32_t il, side s) const {
        const kvp_log_block & block = blocks[at.block];
        const uint8_t *       layer = block.rows + size_t(il) * block.n * (log.k_row + log.v_row);
        return s == side::k ? layer + at.row * log.k_row : layer + block.n * log.k_row + at.row * log.v_row;
    }

private:
    size_t next_block(kvp_token_index token) const; // the first that ends behind it

    const kvp_log_layout & log;
    const kvp_log_block *  blocks;
    std::vector<int64_t>   ends;         // [n_blocks] token behind the last one
    std::vector<size_t>    first_number; // [n_blocks]
    size_t                 n_rows = 0;
    mutable size_t         last   = 0;
};

} // namespace kvp
