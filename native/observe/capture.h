// What later queries pay to earlier tokens, reduced while llama.cpp computes it: per KV head the largest
// attention over the query heads that share it, summed into blocks of queries.
#pragma once

#include "kvp_edge.h"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvp {

// How many f16 values kvp_capture_end writes for one KV head: block b of queries [start, end) has one for
// every token before `end`, which are all that its queries can see.
size_t sums_per_head(uint32_t first, uint32_t block, uint32_t n_tokens);

// The sums of one layer, filled query by query.
class layer_sums {
public:
    layer_sums(const kvp_capture_plan & plan, int32_t layer);

    // One micro-batch of attention, f32 [n_head, n_query, n_kv] with byte strides; cell i holds token i.
    // Throws kvp::error on numbers that are no probabilities, or that look past the query's own token.
    void add(const char * attn, size_t n_kv, size_t n_query, size_t n_head, size_t stride_query, size_t stride_head);

    // Closes the last, perhaps partial, block and copies all sums out: [n_head_kv, per_head] with rows
    // `per_head` apart.
    void finish(uint16_t * out, size_t per_head);

    int32_t layer() const { return il; }
    size_t  n_seen() const { return seen; }

private:
    void close_block();

    kvp_capture_plan                   plan;
    int32_t                            il;        // layer number in the model
    size_t                             seen = 0;  // queries so far
    size_t                             until;     // the query that ends the open block
    std::vector<float>                 open;      // [n_head_kv, n_tokens], the open block
    std::vector<float>                 row;       // [n_tokens], the largest of a group
    std::vector<std::vector<uint16_t>> closed;    // per KV head, blocks side by side
};

} // namespace kvp
