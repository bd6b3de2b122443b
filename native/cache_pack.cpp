// Changing what the cache holds: tokens are removed, and rows packed, where they lie or as a state.
#include "cache.h"

#include "error.h"

#include <algorithm>
#include <numeric>

using namespace kvp;

void kvp_cache::remove(int32_t p0, int32_t p1) {
    if (!llama_memory_seq_rm(mem, SEQ_CHAT, p0, p1)) {
        fail(KVP_ERR_RUNTIME, "llama.cpp would not remove positions [%d, %d) from its cache", p0, p1);
    }
    if (place) {
        place->cells.remove(p0, p1 < 0 ? INT32_MAX : p1);
    }
}

void kvp_cache::move(const int32_t * present, const int32_t * positions, uint32_t n) {
    // Cells only move down, so none of a later run is caught by an earlier one's range.
    for (uint32_t i = 0; i < n;) {
        uint32_t end = i + 1;
        while (end < n && positions[end] - present[end] == positions[i] - present[i]) {
            ++end;
        }
        llama_memory_seq_add(mem, SEQ_CHAT, present[i], present[end - 1] + 1, positions[i] - present[i]);
        i = end;
    }
    if (place) {
        place->cells.rename(present, positions, n);
    }
}

void kvp_cache::pack(const pack_plan & plan) {
    const int32_t newest = llama_memory_seq_pos_max(mem, SEQ_CHAT);
    if (plan.n == 0 || plan.n_keep == 0 || plan.present[plan.n - 1] != newest) {
        fail(KVP_ERR_ARGUMENT, "the newest token is at position %d, not %d: the table of kept tokens is out of date", newest,
             plan.n ? plan.present[plan.n - 1] : -1);
    }
    const int32_t last = plan.positions[plan.n_keep - 1];
    if (plan.shift.frequency && shape.has_window) {
        fail(KVP_ERR_UNSUPPORTED, "keys of a model with sliding-window layers cannot be turned while they are packed");
    }
    if (!plan.shift.frequency && last != newest) {
        fail(KVP_ERR_ARGUMENT, "the newest token must stay at position %d, from which llama.cpp continues, not %d", newest, last);
    }
    if (pack_in_place(plan, newest)) {
        ++packed;
        return;
    }
    const size_t size     = take_state(SEQ_CHAT, blob_bound(plan.n));
    uint8_t *    bytes    = blob.data();
    const size_t new_size = pack_state(bytes, size, SEQ_CHAT, plan);

    // It was packed in place to spare the memory of a second state, so from here on there is no way back.
    set_state(bytes, new_size, last);
    ++packed_as_state;
}

// Whether it was possible; if not, nothing has changed.
bool kvp_cache::pack_in_place(const pack_plan & plan, int32_t newest) {
    if (!check_rows(plan) || !place || plan.shift.frequency) {
        return false;
    }
    const auto cells     = place->cells.find(plan.present, plan.n);
    const auto survivors = surviving_rows(plan);
    if (cells.empty() || survivors.empty() || plan.positions[plan.n_keep - 1] != newest || thins_window(plan, survivors)) {
        return false;
    }
#ifndef NDEBUG
    check_cells(plan.present, plan.n);
#endif
    llama_synchronize(ctx);
    try {
        place->pack(plan, survivors, cells);
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
            remove(plan.present[row], plan.present[end - 1] + 1);
            row = end;
        }
        defragment(plan.positions, plan.n_keep);
    } catch (const error & e) {
        clear_after_failure(e);
    }
    return true;
}

void kvp_cache::clear_after_failure(const error & e) {
    llama_memory_seq_rm(mem, SEQ_READ, -1, -1);
    llama_memory_seq_rm(mem, SEQ_CHAT, -1, -1);
    place->cells.clear();
    fail(KVP_ERR_RUNTIME, "%s. The cache is empty now, and the conversation must be read again", e.message.c_str());
}

// A window cache loses the positions that the base cache loses. Whether the next token may see one of them, or
// would if the conversation were cut first among the newest rows, which stay where they are in all heads.
bool kvp_cache::thins_window(const pack_plan & plan, const std::vector<uint32_t> & survivors) const {
    if (!shape.has_window) {
        return false;
    }
    uint32_t gone = plan.n; // the newest row that goes
    while (gone > 0 && plan.n - gone < plan.n_keep && survivors[plan.n_keep - 1 - (plan.n - gone)] == gone - 1) {
        --gone;
    }
    if (gone == 0 || plan.present[gone - 1] < llama_memory_seq_pos_min(mem, SEQ_CHAT)) {
        return false;
    }
    const uint32_t cut = std::min(rows_to_move(plan, survivors).last, plan.n_keep - 1);
    return plan.present[gone - 1] > plan.positions[cut] - llama_model_n_swa(llama_get_model(ctx));
}

// Attention runs over all cells up to the highest one in use. So the newest tokens, whose positions bind them to
// the cells they were written to, go to the lowest free ones: as a state that stays on its device. But
// llama.cpp's copies on a device (llama_io_write_device in src/llama-context.cpp) take the number of a quantised
// tensor's blocks for that of its values, and end the process where memory for them is lacking. Then these few
// rows would go through the host, which is worth it only where more than half of the cells in use are holes:
// the next tokens fill holes first, and at the next eviction these rows are old and move like others.
void kvp_cache::defragment(const int32_t * positions, uint32_t n) {
    std::vector<uint32_t> cells = place->cells.find(positions, n);
    const auto   high   = std::find_if(cells.begin(), cells.end(), [&](uint32_t cell) { return cell >= n; });
    const bool   pieces = shape.v_transposed && !place->on_host(); // one for every column: slower than the holes
    if (cells.empty() || high == cells.end() || shape.has_window || pieces) {
        return;
    }
    const bool quantised = ggml_is_quantized(ggml_type(shape.type_k)) || ggml_is_quantized(ggml_type(shape.type_v));
    const bool stays     = !place->on_host() && !quantised && place->has_room(size_t(cells.end() - high));
    if (!stays && !place->on_host() && *std::max_element(high, cells.end()) < 2 * n) {
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
    const auto looked = [&](const std::vector<uint32_t> & at) -> std::optional<std::vector<float>> {
        try {
            return place->look(at);
        } catch (const error & e) {
            if (e.code != KVP_ERR_UNSUPPORTED && e.code != KVP_ERR_MEMORY) {
                throw;
            }
            return std::nullopt;
        }
    };
    const auto before = looked(from);
    if (!before) {
        return; // no use moving what cannot be found again
    }
    const llama_state_seq_flags flags = stays ? LLAMA_STATE_SEQ_FLAGS_ON_DEVICE : LLAMA_STATE_SEQ_FLAGS_NONE;
    const size_t                room  = blob_bound(stays ? 0 : uint32_t(from.size())) + 12 * from.size();
    llama_memory_seq_cp(mem, SEQ_CHAT, SEQ_READ, positions[first], -1);
    const size_t size = llama_state_seq_get_data_ext(ctx, blob.room_for(room), room, SEQ_READ, flags);
    llama_memory_seq_rm(mem, SEQ_READ, -1, -1);
    if (size == 0) {
        return; // nothing has changed
    }
    remove(positions[first], -1);
    if (llama_state_seq_set_data_ext(ctx, blob.data(), size, SEQ_READ, flags) != size) {
        fail(KVP_ERR_RUNTIME, "llama.cpp did not take its newest %zu tokens back", from.size());
    }
    if (!place->on_host() && !stays) {
        bytes_transferred += 2 * size;
    }
    llama_memory_seq_cp(mem, SEQ_READ, SEQ_CHAT, -1, -1);
    llama_memory_seq_rm(mem, SEQ_READ, -1, -1);
    // llama.cpp tells nobody which cells it took; if not the lowest free ones, they are not known
    if (looked(to) == before) {
        for (auto cell = cells.begin() + first; cell != cells.end(); ++cell) {
            *cell = to[size_t(std::lower_bound(from.begin(), from.end(), *cell) - from.begin())];
        }
        place->cells.assign(positions, cells);
    } else {
        place->cells.clear();
    }
}

void kvp_cache::check_state(const uint8_t * bytes, size_t size, const int32_t * present, uint32_t n) const {
    const state_blob state = parse_state_blob(bytes, size, SEQ_CHAT);
    std::vector<int32_t> pos = state.base.pos;
    std::sort(pos.begin(), pos.end());
    if (n == 0 || pos != std::vector<int32_t>(present, present + n)) {
        fail(KVP_ERR_ARGUMENT, "the saved state holds %zu tokens, but not at the %u positions its table names", pos.size(), n);
    }
    if (state.has_window != (shape.has_window != 0) || state.base.layers.size() != shape.n_layer ||
        state.base.v_trans != (shape.v_transposed != 0)) {
        fail(KVP_ERR_UNSUPPORTED, "the saved state has %zu layers%s%s, and this cache has %u%s%s", state.base.layers.size(),
             state.base.v_trans ? ", V transposed" : "", state.has_window ? ", a window" : "", shape.n_layer,
             shape.v_transposed ? ", V transposed" : "", shape.has_window ? ", a window" : "");
    }
    for (const layer_rows & layer : state.base.layers) {
        if (layer.type_k != shape.type_k || layer.type_v != shape.type_v ||
            uint64_t(shape.n_layer) * (layer.k_row + layer.v_row) != shape.bytes_per_cell) {
            fail(KVP_ERR_UNSUPPORTED, "the saved state holds rows of %zu bytes of %s and %zu of %s, which this cache does not",
                 layer.k_row, ggml_type_name(layer.type_k), layer.v_row, ggml_type_name(layer.type_v));
        }
    }
}

void kvp_cache::restore(const uint8_t * bytes, size_t size, const int32_t * present, uint32_t n) {
    check_state(bytes, size, present, n);
    set_state(bytes, size, present[n - 1]);
}

// A state that llama.cpp does not take leaves the cache empty, never half full.
void kvp_cache::set_state(const uint8_t * bytes, size_t size, int32_t newest) {
    const size_t taken = llama_state_seq_set_data(ctx, bytes, size, SEQ_CHAT);
    if (taken != size || llama_memory_seq_pos_max(mem, SEQ_CHAT) != newest) {
        llama_memory_seq_rm(mem, SEQ_CHAT, -1, -1);
        fail(KVP_ERR_RUNTIME,
             "llama.cpp took %zu of the %zu bytes of a changed cache. The cache is empty now, and the conversation must be "
             "read again",
             taken, size);
    }
    bytes_transferred += size;
    if (place) {
        // The cells of an empty cache are taken in order.
        const state_blob state = parse_state_blob(bytes, size, SEQ_CHAT);
        place->cells.clear();
        bytes_transferred += place->on_host() ? 0 : state.base.pos.size() * state.base.layers.front().k_row;
        if (place->begins_with(state.base)) {
            std::vector<uint32_t> cells(state.base.pos.size());
            std::iota(cells.begin(), cells.end(), 0u);
            place->cells.assign(state.base.pos.data(), cells);
        }
    }
}
