// Where tokens' rows are found: in the cache itself as far as it lies in host memory, else in a state of
// llama.cpp's.
#include "cache/cache.h"
#include "error.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <numeric>

using namespace kvp;

namespace {

// Indices of positions, ascending.
std::vector<uint32_t> ascending(const std::vector<int32_t> & positions) {
    std::vector<uint32_t> order(positions.size());
    std::iota(order.begin(), order.end(), 0u);
    std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return positions[a] < positions[b]; });
    return order;
}

} // namespace

// Bytes that a blob of n tokens cannot exceed (see state_blob.h), or 0 where a window cache, whose
// tokens are not counted here, comes after the base cache.
size_t kvp_cache::blob_bound(uint32_t n) const {
    const size_t per_layer = 32; // types and sizes of K and V
    return layout.has_window ? 0 : 64 + n * 12 + layout.n_layer * per_layer + n * layout.bytes_per_cell;
}

std::vector<kvp_cell_index> kvp_cache::known_cells(kvp_llama_position p0, kvp_llama_position p1, uint32_t n,
                                                   kvp_llama_position * positions) const {
    if (!location || n == 0) {
        return {};
    }
    const auto known = location->positions(p0, std::min(p1, memory.newest() + 1));
    if (known.size() != n) {
        return {};
    }
    std::copy(known.begin(), known.end(), positions);
    return location->cells_of(positions, n);
}

token_rows kvp_cache::find_rows(kvp_llama_position p0, kvp_llama_position p1, uint32_t n,
                                kvp_llama_position * positions, from where) {
    if (p0 < 0 || p1 < p0 || !positions) {
        fail(KVP_ERR_ARGUMENT, "a position range must be 0 <= p0 <= p1 with room for its positions, not [%d, %d)", p0, p1);
    }
    if (location && (where == from::anywhere || (where == from::host && location->on_host()))) {
        std::vector<kvp_cell_index> cells = known_cells(p0, p1, n, positions);
        if (!cells.empty()) {
            memory.wait();
            return { layout.v_transposed != 0, location->rows(), std::move(cells), true };
        }
    }
    state_blob state = memory.read(p0, p1, blob_bound(n));
    auto &     base  = state.base;
    if (base.pos.size() != n) {
        fail(KVP_ERR_ARGUMENT, "positions [%d, %d) hold %zu tokens, not the %u expected", p0, p1, base.pos.size(), n);
    }
    if (n > 0 && base.layers.size() != layout.n_layer) {
        fail(KVP_ERR_LAYOUT, "llama.cpp's state blob has %zu layers, but had %u when the cache was opened",
             base.layers.size(), layout.n_layer);
    }
    std::vector<uint32_t> order = ascending(base.pos);
    for (uint32_t i = 0; i < n; ++i) {
        positions[i] = base.pos[order[i]];
    }
    return { base.v_trans, std::move(base.layers), std::move(order), false };
}

void kvp_cache::read(kvp_llama_position p0, kvp_llama_position p1, uint32_t n, kvp_llama_position * positions,
                     float * keys, float * values) {
    const token_rows tokens = find_rows(p0, p1, n, positions, from::host);
    if (n == 0) {
        return;
    }
    const uint32_t n_head = layout.n_head_kv;
    // [n, n_head, d] of a layer -> [n_head, n, d] of the result
    const auto spread = [&](float * out, uint32_t d) {
        return [=](uint32_t il, const float * rows) {
            float * layer = out + size_t(il) * n_head * n * d;
            for (uint32_t i = 0; i < n; ++i) {
                for (uint32_t h = 0; h < n_head; ++h) {
                    std::memcpy(layer + (size_t(h) * n + i) * d, rows + (size_t(i) * n_head + h) * d, d * sizeof(float));
                }
            }
        };
    };
    if (keys) {
        each_layer(tokens, false, spread(keys, layout.head_size_k));
    }
    if (values) {
        each_layer(tokens, true, spread(values, layout.head_size_v));
    }
}

bool kvp_cache::check_cells(const kvp_llama_position * present, uint32_t n) {
    const auto cells = location ? location->cells_of(present, n) : std::vector<uint32_t>();
    if (cells.empty()) {
        return false;
    }
    memory.wait();
    const auto       bytes = memory.take_state(blob_bound(n), false); // no part of an eviction
    const state_blob state = parse_state_blob(bytes.data, bytes.size, context_memory::SEQ_CHAT);
    const auto       order = ascending(state.base.pos);
    bool             same  = order.size() == n;
    for (uint32_t i = 0; same && i < n; ++i) {
        same = state.base.pos[order[i]] == present[i];
    }
    if (!same) {
        fail(KVP_ERR_ARGUMENT, "the cache holds %zu tokens, but not at the %u positions named", order.size(), n);
    }
    location->compare(state.base, order, cells);
    return true;
}

kvp_cache_location kvp_cache::location_info() const {
    kvp_cache_location info{};
    info.known             = location.has_value();
    info.on_device         = location && !location->on_host();
    info.can_pack          = location && location->can_pack();
    info.packed_in_place   = packed_in_place;
    info.packed_as_state   = packed_as_state;
    info.bytes_transferred = memory.bytes_transferred() + bytes_checked + (location ? location->bytes_transferred() : 0);
    std::snprintf(info.where, sizeof(info.where), "%s", location ? location->devices().c_str() : why_unknown.c_str());
    return info;
}
