// The queries of the newest tokens, taken where attention reads them: after norm and RoPE, whatever the
// model and whether flash attention is on or not.
#pragma once

#include "kvp_edge.h"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvp {

// The newest `capacity` tokens' queries of all layers, in a ring. A token's queries come in layer by layer
// while a graph runs, and lie apart until commit(): a batch that fails half-way, or does not count because of
// an interrupt, leaves no token half there and has passed over none.
class query_ring {
public:
    query_ring(uint32_t n_layer, uint32_t n_head, uint32_t head_size, uint32_t capacity);

    // One more token's query of one layer: the caller fills [n_head, head_size].
    float * next(uint32_t layer);
    // Whether every layer has got exactly n tokens since the last commit.
    bool has_new(uint32_t n) const;
    // They are the tokens first, first + 1, ... of the conversation.
    void commit(int32_t first, uint32_t n);
    // Forgets the tokens from `length` on, and those that were not committed.
    void rewind(int32_t length);
    // Forgets those that were not committed.
    void drop_new();

    uint32_t size() const { return uint32_t(committed - oldest); }
    // The newest n: [n_layer, n_head, n, head_size] and [n], ascending.
    void read(uint32_t n, float * queries, int32_t * indices) const;

private:
    uint32_t n_layer;
    size_t   row; // floats of a token in a layer: [n_head, head_size]
    uint32_t n_head, head_size, capacity;
    uint64_t committed = 0; // tokens so far; token number i lies in slot i % capacity
    uint64_t oldest    = 0; // the first that was not overwritten yet

    std::vector<uint64_t>           n_new; // per layer: tokens that came in since the last commit
    std::vector<std::vector<float>> fresh; // per layer: theirs, the newest of them: [<= capacity, n_head, head_size]
    std::vector<int32_t>            index; // per slot: of its token in the conversation
    std::vector<float>              data;  // [n_layer, capacity, n_head, head_size]
};

} // namespace kvp
