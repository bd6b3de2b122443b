// Where tokens' rows are found: in the cache itself as far as it lies in host memory, else in a state of
// llama.cpp's.
#include "cache.h"

#include "error.h"

#include <algorithm>
#include <numeric>

using namespace kvp;

std::vector<uint32_t> kvp::ascending(const std::vector<int32_t> & positions) {
    std::vector<uint32_t> order(positions.size());
    std::iota(order.begin(), order.end(), 0u);
    std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return positions[a] < positions[b]; });
    return order;
}

// The state of a sequence, in `blob`; returns its size. llama.cpp sizes a state by a full dry run; an
// upper bound saves that where it is known.
size_t kvp_cache::take_state(llama_seq_id seq, size_t upper_bound) {
    const size_t size = upper_bound > 0 ? upper_bound : llama_state_seq_get_size(ctx, seq);
    const size_t got  = llama_state_seq_get_data(ctx, blob.room_for(size), size, seq);
    if (got == 0) {
        fail(KVP_ERR_RUNTIME, "llama.cpp could not write its state into %zu bytes: the cache could not be read", size);
    }
    bytes_transferred += got;
    return got;
}

// Takes the blob of the tokens at [p0, p1). Invariant: SEQ_READ is empty before and after.
state_blob kvp_cache::read_blob(int32_t p0, int32_t p1, size_t upper_bound) {
    llama_memory_seq_cp(mem, SEQ_CHAT, SEQ_READ, p0, p1); // in a unified cache this only tags cells
    size_t size = 0;
    try {
        size = take_state(SEQ_READ, upper_bound);
    } catch (...) {
        llama_memory_seq_rm(mem, SEQ_READ, -1, -1);
        throw;
    }
    llama_memory_seq_rm(mem, SEQ_READ, -1, -1);
    return parse_state_blob(blob.data(), size, SEQ_READ);
}

// Bytes that a blob of n tokens cannot exceed (see state_blob.h), or 0 where a window cache, whose
// tokens are not counted here, comes after the base cache.
size_t kvp_cache::blob_bound(uint32_t n) const {
    const size_t per_layer = 32; // types and sizes of K and V
    return shape.has_window ? 0 : 64 + n * 12 + shape.n_layer * per_layer + n * shape.bytes_per_cell;
}

std::vector<uint32_t> kvp_cache::known_cells(int32_t p0, int32_t p1, uint32_t n, int32_t * positions) const {
    if (!place || n == 0) {
        return {};
    }
    const auto held = place->cells.positions(p0, std::min(p1, llama_memory_seq_pos_max(mem, SEQ_CHAT) + 1));
    if (held.size() != n) {
        return {};
    }
    std::copy(held.begin(), held.end(), positions);
    return place->cells.find(positions, n);
}

token_rows kvp_cache::find_rows(int32_t p0, int32_t p1, uint32_t n, int32_t * positions, from where) {
    if (p0 < 0 || p1 < p0 || !positions) {
        fail(KVP_ERR_ARGUMENT, "a position range must be 0 <= p0 <= p1 with room for its positions, not [%d, %d)", p0, p1);
    }
    if (place && (where == from::anywhere || (where == from::host && place->on_host()))) {
        std::vector<uint32_t> cells = known_cells(p0, p1, n, positions);
        if (!cells.empty()) {
            llama_synchronize(ctx);
            return { shape.v_transposed != 0, place->rows(), std::move(cells), true };
        }
    }
    state_blob state = read_blob(p0, p1, blob_bound(n));
    auto &     base  = state.base;
    if (base.pos.size() != n) {
        fail(KVP_ERR_ARGUMENT, "positions [%d, %d) hold %zu tokens, not the %u expected", p0, p1, base.pos.size(), n);
    }
    if (n > 0 && base.layers.size() != shape.n_layer) {
        fail(KVP_ERR_LAYOUT, "llama.cpp's state blob has %zu layers, but had %u when the cache was opened",
             base.layers.size(), shape.n_layer);
    }
    std::vector<uint32_t> order = ascending(base.pos);
    for (uint32_t i = 0; i < n; ++i) {
        positions[i] = base.pos[order[i]];
    }
    return { base.v_trans, std::move(base.layers), std::move(order), false };
}

bool kvp_cache::check_cells(const int32_t * present, uint32_t n) {
    const auto cells = place ? place->cells.find(present, n) : std::vector<uint32_t>();
    if (cells.empty()) {
        return false;
    }
    llama_synchronize(ctx);
    const uint64_t   before = bytes_transferred;
    const size_t     size   = take_state(SEQ_CHAT, blob_bound(n));
    const state_blob state  = parse_state_blob(blob.data(), size, SEQ_CHAT);
    bytes_transferred                 = before; // no part of an eviction
    const auto       order = ascending(state.base.pos);
    bool             same  = order.size() == n;
    for (uint32_t i = 0; same && i < n; ++i) {
        same = state.base.pos[order[i]] == present[i];
    }
    if (!same) {
        fail(KVP_ERR_ARGUMENT, "the cache holds %zu tokens, but not at the %u positions named", order.size(), n);
    }
    place->compare(state.base, order, cells);
    return true;
}
