// Changing what the cache holds: tokens are removed, and rows packed, where they lie or as a state.
#include "cache/cache.h"
#include "error.h"
#include "state/pack_state.h"

#include <algorithm>
#include <numeric>

using namespace kvp;

void kvp_cache::appended(kvp_llama_position first, uint32_t n) {
    if (location) {
        location->appended(first, n);
    }
}

void kvp_cache::forget() {
    if (location) {
        location->forget();
    }
}

void kvp_cache::remove_range(kvp_llama_position p0, kvp_llama_position p1) {
    memory.remove(p0, p1);
    if (location) {
        location->removed(p0, p1);
    }
}

uint32_t kvp_cache::remove(const kvp_llama_position * present, const uint8_t * keep, uint32_t n) {
    for (uint32_t i = 0; i < n; ++i) {
        if (present[i] < 0 || (i > 0 && present[i] <= present[i - 1])) {
            fail(KVP_ERR_ARGUMENT, "present positions must ascend, but entry %u is %d", i, present[i]);
        }
    }
    const int32_t newest = memory.newest();
    if (present[n - 1] != newest) {
        fail(KVP_ERR_ARGUMENT, "the newest token is at position %d, not %d: the table of kept tokens is out of date", newest,
             present[n - 1]);
    }
    if (!keep[n - 1]) {
        fail(KVP_ERR_ARGUMENT, "the newest token (position %d) cannot be removed: llama.cpp continues from it", newest);
    }
    // Positions between two present ones hold nothing, so a range may run across them: one call
    // per run of removed entries, and no fewer calls can leave the kept entries between the runs.
    uint32_t n_ranges = 0;
    for (uint32_t i = 0; i < n;) {
        if (keep[i]) {
            ++i;
            continue;
        }
        uint32_t end = i;
        while (!keep[end]) {
            ++end; // stops: keep[n - 1] is set
        }
        remove_range(present[i], present[end - 1] + 1);
        ++n_ranges;
        i = end;
    }
    return n_ranges;
}

void kvp_cache::move(const kvp_llama_position * present, const kvp_llama_position * positions, uint32_t n) {
    for (uint32_t i = 0; i < n; ++i) {
        if (positions[i] < 0 || positions[i] > present[i] ||
            (i > 0 && (present[i] <= present[i - 1] || positions[i] <= positions[i - 1]))) {
            fail(KVP_ERR_ARGUMENT, "cells move down and keep their order, but entry %u goes from %d to %d", i, present[i],
                 positions[i]);
        }
    }
    // Cells only move down, so none of a later run is caught by an earlier one's range.
    for (uint32_t i = 0; i < n;) {
        uint32_t end = i + 1;
        while (end < n && positions[end] - present[end] == positions[i] - present[i]) {
            ++end;
        }
        memory.shift(present[i], present[end - 1] + 1, positions[i] - present[i]);
        i = end;
    }
    if (location) {
        location->moved(present, positions, n);
    }
}

void kvp_cache::pack(const pack_plan & plan) {
    const int32_t newest = memory.newest();
    if (plan.n == 0 || plan.n_keep == 0 || plan.present[plan.n - 1] != newest) {
        fail(KVP_ERR_ARGUMENT, "the newest token is at position %d, not %d: the table of kept tokens is out of date", newest,
             plan.n ? plan.present[plan.n - 1] : -1);
    }
    const int32_t last = plan.positions[plan.n_keep - 1];
    if (plan.shift.frequency && layout.has_window) {
        fail(KVP_ERR_UNSUPPORTED, "keys of a model with sliding-window layers cannot be turned while they are packed");
    }
    if (!plan.shift.frequency && last != newest) {
        fail(KVP_ERR_ARGUMENT, "the newest token must stay at position %d, from which llama.cpp continues, not %d", newest, last);
    }
    if (try_to_pack_in_place(plan, newest)) {
        ++packed_in_place;
        return;
    }
    const auto   state    = memory.take_state(blob_bound(plan.n));
    const size_t new_size = pack_state(state.data, state.size, context_memory::SEQ_CHAT, plan);

    // It was packed in place to spare the memory of a second state, so from here on there is no way back.
    set_state(state.data, new_size, last);
    ++packed_as_state;
}

// Whether it was possible; if not, nothing has changed.
bool kvp_cache::try_to_pack_in_place(const pack_plan & plan, int32_t newest) {
    if (!check_rows(plan) || !location || plan.shift.frequency) {
        return false;
    }
    const auto cells     = location->cells_of(plan.present, plan.n);
    const auto survivors = surviving_rows(plan);
    if (cells.empty() || survivors.empty() || plan.positions[plan.n_keep - 1] != newest || thins_window(plan, survivors)) {
        return false;
    }
#ifndef NDEBUG
    check_cells(plan.present, plan.n);
#endif
    memory.wait();
    try {
        location->pack(plan, survivors, cells);
    } catch (const error & e) {
        if (e.code == KVP_ERR_UNSUPPORTED || e.code == KVP_ERR_MEMORY) {
            return false; // before anything was changed
        }
        clear_after_failure(e);
    }
    try {
        for (uint32_t row = 0, i = 0; row < plan.n;) { // what is between two survivors goes in one range
            if (i < plan.n_keep && survivors[i] == row) {
                ++i, ++row;
                continue;
            }
            const uint32_t end = i < plan.n_keep ? survivors[i] : plan.n;
            remove_range(plan.present[row], plan.present[end - 1] + 1);
            row = end;
        }
        defragment(plan.positions, plan.n_keep);
    } catch (const error & e) {
        clear_after_failure(e);
    }
    return true;
}

void kvp_cache::clear_after_failure(const error & e) {
    memory.clear();
    forget();
    fail(KVP_ERR_RUNTIME, "%s. The cache is empty now, and the conversation must be read again", e.message.c_str());
}

// A window cache loses the positions that the base cache loses. Whether the next token may see one of them, or
// would if the conversation were cut first among the newest rows, which stay where they are in all heads.
bool kvp_cache::thins_window(const pack_plan & plan, const std::vector<uint32_t> & survivors) const {
    if (!layout.has_window) {
        return false;
    }
    uint32_t gone = plan.n; // the newest row that goes
    while (gone > 0 && plan.n - gone < plan.n_keep && survivors[plan.n_keep - 1 - (plan.n - gone)] == gone - 1) {
        --gone;
    }
    if (gone == 0 || plan.present[gone - 1] < memory.oldest()) {
        return false;
    }
    const uint32_t cut = std::min(rows_to_move(plan, survivors).last, plan.n_keep - 1);
    return plan.present[gone - 1] > plan.positions[cut] - llama_model_n_swa(memory.model());
}

// Attention runs over all cells up to the highest one in use. So the newest tokens, whose positions bind them to
// the cells they were written to, go to the lowest free ones: as a state that stays on its device. But
// llama.cpp's copies on a device (llama_io_write_device in src/llama-context.cpp) take the number of a quantised
// tensor's blocks for that of its values, and end the process where memory for them is lacking. Then these few
// rows would go through the host, which is worth it only where more than half of the cells in use are holes:
// the next tokens fill holes first, and at the next eviction these rows are old and move like others.
void kvp_cache::defragment(const kvp_llama_position * positions, uint32_t n) {
    std::vector<kvp_cell_index> cells = location->cells_of(positions, n);
    const auto   high   = std::find_if(cells.begin(), cells.end(), [&](uint32_t cell) { return cell >= n; });
    const bool   pieces = layout.v_transposed && !location->on_host(); // one for every column: slower than the holes
    if (cells.empty() || high == cells.end() || layout.has_window || pieces) {
        return;
    }
    const bool quantised = ggml_is_quantized(ggml_type(layout.type_k)) || ggml_is_quantized(ggml_type(layout.type_v));
    const bool stays     = !location->on_host() && !quantised && location->has_room(size_t(cells.end() - high));
    if (!stays && !location->on_host() && *std::max_element(high, cells.end()) < 2 * n) {
        return;
    }
    const auto            first = uint32_t(high - cells.begin());
    std::vector<uint32_t> from(high, cells.end()), to;
    std::sort(from.begin(), from.end()); // a state holds its tokens in the order of their cells
    std::vector<bool> used(n);
    for (uint32_t i = 0; i < first; ++i) {
        used[cells[i]] = true; // below n, as it is before the first that is not
    }
    for (uint32_t cell = 0; to.size() < from.size(); ++cell) {
        if (!used[cell]) {
            to.push_back(cell);
        }
    }
    const auto norms_in = [&](const std::vector<uint32_t> & at) -> std::optional<std::vector<float>> {
        try {
            return location->key_norms(at);
        } catch (const error & e) {
            if (e.code != KVP_ERR_UNSUPPORTED && e.code != KVP_ERR_MEMORY) {
                throw;
            }
            return std::nullopt;
        }
    };
    const auto before = norms_in(from);
    if (!before) {
        return; // no use moving what cannot be found again
    }
    const size_t bound = blob_bound(stays ? 0 : uint32_t(from.size())) + 12 * from.size();
    if (!memory.reinsert(positions[first], bound, stays, !location->on_host() && !stays)) {
        return;
    }
    // llama.cpp tells nobody which cells it took; if not the lowest free ones, they are not known
    if (norms_in(to) == before) {
        for (auto cell = cells.begin() + first; cell != cells.end(); ++cell) {
            *cell = to[size_t(std::lower_bound(from.begin(), from.end(), *cell) - from.begin())];
        }
        location->are_in(positions, cells);
    } else {
        location->forget();
    }
}

void kvp_cache::check_state(const uint8_t * bytes, size_t size, const kvp_llama_position * present, uint32_t n) const {
    const state_blob state = parse_state_blob(bytes, size, context_memory::SEQ_CHAT);
    std::vector<int32_t> pos = state.base.pos;
    std::sort(pos.begin(), pos.end());
    if (n == 0 || pos != std::vector<int32_t>(present, present + n)) {
        fail(KVP_ERR_ARGUMENT, "the saved state holds %zu tokens, but not at the %u positions its table names", pos.size(), n);
    }
    if (state.has_window != (layout.has_window != 0) || state.base.layers.size() != layout.n_layer ||
        state.base.v_trans != (layout.v_transposed != 0)) {
        fail(KVP_ERR_UNSUPPORTED, "the saved state has %zu layers%s%s, and this cache has %u%s%s", state.base.layers.size(),
             state.base.v_trans ? ", V transposed" : "", state.has_window ? ", a window" : "", layout.n_layer,
             layout.v_transposed ? ", V transposed" : "", layout.has_window ? ", a window" : "");
    }
    for (const layer_rows & layer : state.base.layers) {
        if (layer.type_k != layout.type_k || layer.type_v != layout.type_v ||
            uint64_t(layout.n_layer) * (layer.k_row + layer.v_row) != layout.bytes_per_cell) {
            fail(KVP_ERR_UNSUPPORTED, "the saved state holds rows of %zu bytes of %s and %zu of %s, which this cache does not",
                 layer.k_row, ggml_type_name(layer.type_k), layer.v_row, ggml_type_name(layer.type_v));
        }
    }
}

void kvp_cache::restore(const uint8_t * bytes, size_t size, const kvp_llama_position * present, uint32_t n) {
    check_state(bytes, size, present, n);
    set_state(bytes, size, present[n - 1]);
}

void kvp_cache::set_state(const uint8_t * bytes, size_t size, int32_t newest) {
    forget();
    memory.set_state(bytes, size, newest);
    if (location) {
        // The cells of an empty cache are taken in order.
        const state_blob state = parse_state_blob(bytes, size, context_memory::SEQ_CHAT);
        bytes_checked += location->on_host() ? 0 : state.base.pos.size() * state.base.layers.front().k_row;
        if (location->begins_with(state.base)) {
            std::vector<kvp_cell_index> cells(state.base.pos.size());
            std::iota(cells.begin(), cells.end(), 0u);
            location->are_in(state.base.pos.data(), cells);
        }
    }
}
