// The attention that queries pay to a KV log's tokens, for one (layer, KV head) after the other.
#pragma once

#include "kvp_edge.h"
#include "log/attention_kernel.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace kvp {

// Tokens of one block that are multiplied at once.
struct log_tile {
    uint32_t block;
    uint32_t row;   // of its first token, in the block
    uint32_t n;     // at most TILE_ROWS
    size_t   token; // number of its first token among all blocks' tokens
};

constexpr uint32_t TILE_ROWS = 128;

// What all threads share; checked by kvp_log_score.
struct score_job {
    const kvp_log_layout &   layout;
    const kvp_log_block *    blocks;
    const kvp_log_queries &  queries;
    std::vector<log_tile>    tiles;    // of the tokens that some query sees: one at least
    size_t                   n_tokens; // of all blocks
    size_t                   width;    // most columns at once, a multiple of COLUMNS
    const attention_kernel & kernel;
    float *                  largest;  // [n_layer, n_head_kv, n_tokens], zero; or NULL
    float *                  mean;     // the same
};

// Floats that begin where vectors are loaded fastest; not initialised.
class aligned_floats {
public:
    explicit aligned_floats(size_t n) : lines(new line[(n + PER_LINE - 1) / PER_LINE]) {}
    operator float *() { return lines[0].values; }

private:
    static constexpr size_t PER_LINE = 16;
    struct alignas(PER_LINE * sizeof(float)) line {
        float values[PER_LINE];
    };
    std::unique_ptr<line[]> lines;
};

// One thread's memory and work.
class head_scorer {
public:
    explicit head_scorer(const score_job & job);

    // Writes its part of job.largest and job.mean. Allocates nothing, throws nothing.
    void score(uint32_t layer, uint32_t head) noexcept;

private:
    void choose_columns(size_t first);
    void turn_columns(const double * turn);
    void read_keys(const log_tile & tile);

    const score_job & job;
    const size_t      group;      // query heads of a KV head
    const size_t      n_columns;  // of a KV head: its queries of all its query heads
    const size_t      head_bytes; // of a key

    uint32_t layer = 0, head = 0;
    size_t   n_chosen = 0; // columns that are scored now
    size_t   width    = 0; // these and what fills up; at most job.width, for which there is room

    aligned_floats       chosen;       // [head_size, width], the queries times scale
    aligned_floats       columns;      // [head_size, width], turned and rotated as the stored keys want it
    std::vector<int32_t> last;         // [width], index of the column's token
    std::vector<uint8_t> stored;       // one key as it is stored, aligned
    aligned_floats       keys;         // [TILE_ROWS, head_size]
    aligned_floats       logits;       // [TILE_ROWS, width]
    aligned_floats       weights;      // [tokens seen, width]
    aligned_floats       factors;      // [tiles, width]
    aligned_floats       largest, sum; // [width]
    std::vector<float>   unwanted;     // [tokens]: in the place of a result that nobody asked for
};

} // namespace kvp
