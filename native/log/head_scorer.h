// The attention that queries pay to a KV log's tokens, for one (layer, KV head) after the other.
#pragma once

#include "kvp_edge.h"
#include "log/attention_kernel.h"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvp {

// Tokens of one block that are multiplied at once.
struct tile {
    uint32_t block;
    uint32_t row;   // of its first token, in the block
    uint32_t n;     // at most TILE_ROWS
    size_t   token; // number of its first token among all blocks' tokens
};

constexpr uint32_t TILE_ROWS = 128;

// What all threads share. Checked: see kvp_log_score.
struct score_job {
    const kvp_log_layout &   layout;
    const kvp_log_block *    blocks;
    const kvp_log_queries &  queries;
    std::vector<tile>        tiles;    // of the tokens that some query sees
    size_t                   n_tokens; // of all blocks
    size_t                   width;    // most columns at once, a multiple of COLUMNS
    const attention_kernel & kernel;
    float *                  largest;  // [n_layer, n_head_kv, n_tokens], zero; or NULL
    float *                  mean;     // the same
};

// One thread's memory and work.
class head_scorer {
public:
    explicit head_scorer(const score_job & job);

    // Writes its part of job.largest and job.mean. Allocates nothing, throws nothing.
    void score(uint32_t layer, uint32_t head) noexcept;

private:
    void choose_columns(size_t first_column);
    void turn_queries(const double * turn);
    void read_keys(const tile & at);

    struct alignas(64) line {
        float values[16];
    };
    // Floats that start where vectors are loaded fastest.
    class floats {
    public:
        explicit floats(size_t n) : lines((n + 15) / 16) {}
        float * get() { return lines.data()->values; }

    private:
        std::vector<line> lines;
    };

    const score_job & job;
    const size_t      group;     // query heads of a KV head
    const size_t      n_columns; // of a KV head: its queries of all its query heads
    const size_t      head_bytes;
    uint32_t          layer = 0, head = 0;

    size_t               first_column = 0, n_chosen = 0, width = 0; // width: n_chosen and what fills up
    floats               columns;    // [head_size, width], these and the following with room for job.width
    std::vector<float>   query;      // [head_size]
    std::vector<double>  cosine, sine; // [n_pairs]
    std::vector<int32_t> last;       // [width], index of the column's token
    std::vector<uint8_t> stored;     // one key as it is stored, aligned
    floats               keys;       // [TILE_ROWS, head_size]
    floats               logits;     // [TILE_ROWS, width]
    floats               weights;    // [tokens seen, width]
    floats               factors;    // [tiles, width]
    floats               largest, sum; // [width]
    std::vector<float>   unwanted;   // [tokens]: in the place of a result that nobody asked for
};

} // namespace kvp
