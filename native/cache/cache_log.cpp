// Rows that go out of the cache to a KV log, and come back into it.
#include "cache/cache.h"
#include "error.h"
#include "state/fill_state.h"

#include <algorithm>

using namespace kvp;

namespace {

constexpr kvp_llama_position MAX_POSITIONS = 1 << 24;

} // namespace

void kvp_cache::log_rows(const kvp_log_layout & log, kvp_llama_position p0, kvp_llama_position p1, uint32_t n, uint8_t * rows) {
    check_log_layout(log, layout);
    std::vector<kvp_llama_position> positions(std::max(n, 1u));
    const token_rows tokens = find_rows(p0, p1, n, positions.data(), from::host);
    for (uint32_t il = 0; n > 0 && il < layout.n_layer; ++il) {
        write_to_log(log, il, tokens.layers[il], tokens.v_trans, tokens.order, rows);
    }
}

void kvp_cache::fill(const fill_plan & plan) {
    check_log_layout(plan.log, layout);
    fill_sources  sources(plan);
    const int32_t newest = memory.newest(), last = plan.positions[plan.n_new - 1];
    const int32_t named  = plan.n > 0 ? plan.present[plan.n - 1] : -1;
    if (named != newest) {
        fail(KVP_ERR_ARGUMENT, "the newest token is at position %d, not %d: the table of kept tokens is out of date", newest, named);
    }
    // The table of where each position lies is as long as the largest one.
    if (last > newest && last >= MAX_POSITIONS) {
        fail(KVP_ERR_ARGUMENT, "new positions are below %d, but the newest is %d", MAX_POSITIONS, last);
    }
    if (plan.n_new > memory.n_cells()) {
        fail(KVP_ERR_ARGUMENT, "%u rows do not fit into the cache's %u cells", plan.n_new, memory.n_cells());
    }
    if (layout.has_window && last != newest) {
        const int32_t oldest = memory.oldest(), seen = last + 2 - llama_model_n_swa(memory.model());
        if (last > newest || oldest < 0 || oldest > std::max(seen, 0)) {
            fail(KVP_ERR_UNSUPPORTED,
                 "the sliding-window layers do not hold what a token behind position %d sees, and a KV log has none of their rows: "
                 "the conversation must be read again",
                 last);
        }
    }
    if (plan.shift.frequency) {
        if (layout.has_window) {
            fail(KVP_ERR_UNSUPPORTED, "keys of a model with sliding-window layers cannot be turned while they are filled in");
        }
        const auto type = ggml_type(layout.type_k);
        check_shift(plan.shift, type, ggml_row_size(type, layout.head_size_k) * layout.n_head_kv, layout.n_head_kv);
    }
    if (try_to_fill_in_place(plan, sources)) {
        return;
    }
    const auto state = memory.take_state(blob_bound(plan.n));
    new_state  made  = fill_state(state.data, state.size, context_memory::SEQ_CHAT, plan, sources);
    if (layout.has_window && last != newest) {
        // A state holds of the window what the next token sees, so the newest ones have to go first.
        try {
            remove_range(last + 1, -1);
            const auto earlier = memory.take_state(0);
            made = with_window(made, parse_state_blob(earlier.data, earlier.size, context_memory::SEQ_CHAT));
        } catch (const error & e) {
            clear_after_failure(e);
        } catch (const std::bad_alloc &) {
            clear_after_failure({ KVP_ERR_MEMORY, "out of memory" });
        }
    }
    set_state(made.bytes.get(), made.size, last);
}

// Whether it was possible: every cell keeps its position, and all are known and in host memory. If not, nothing has
// changed.
bool kvp_cache::try_to_fill_in_place(const fill_plan & plan, fill_sources & sources) {
    if (!location || !location->on_host() || plan.shift.frequency || plan.n != plan.n_new ||
        !std::equal(plan.present, plan.present + plan.n, plan.positions)) {
        return false;
    }
    std::vector<kvp_llama_position> held(plan.n);
    const auto cells = known_cells(0, INT32_MAX, plan.n, held.data());
    if (cells.empty()) {
        return false;
    }
    if (!std::equal(held.begin(), held.end(), plan.present)) {
        fail(KVP_ERR_ARGUMENT, "the cache holds %u tokens, but not at the positions named: the table of kept tokens is out of date",
             plan.n);
    }
    memory.wait();
    location->fill(plan, sources, cells);
    return true;
}
