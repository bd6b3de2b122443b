// kvp_cache: one context's KV cache, read and thinned through llama.cpp's public API.
#include "error.h"
#include "in_place.h"
#include "pack.h"
#include "policy.h"
#include "rows.h"
#include "scorers.h"
#include "state_blob.h"
#include "watch.h"

#include "llama.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

namespace {

using namespace kvp;

constexpr llama_seq_id SEQ_CHAT = 0;
constexpr llama_seq_id SEQ_READ = 1; // tags the cells being read; empty between calls

int64_t meta_int(const llama_model * model, const std::string & key, int64_t fallback) {
    char text[64];
    return llama_model_meta_val_str(model, key.c_str(), text, sizeof(text)) > 0 ? std::strtoll(text, nullptr, 10) : fallback;
}

std::string architecture(const llama_model * model) {
    char text[64] = "";
    llama_model_meta_val_str(model, "general.architecture", text, sizeof(text));
    return text;
}

void refuse_unsupported_model(const llama_model * model, const std::string & arch) {
    const char * why = nullptr;
    if (llama_model_is_recurrent(model)) {
        why = "it is recurrent: its memory is one state, not a cell for every token";
    } else if (llama_model_is_hybrid(model)) {
        why = "it is a hybrid with recurrent layers, whose state cannot be taken back to an earlier token";
    } else if (llama_model_has_encoder(model)) {
        why = "it has an encoder, and only decoder-only models have a cache of the conversation";
    } else if (llama_model_is_diffusion(model)) {
        why = "it is a diffusion model: it does not read a conversation token by token";
    } else {
        switch (llama_model_rope_type(model)) {
            case LLAMA_ROPE_TYPE_NONE:
            case LLAMA_ROPE_TYPE_NORM:
            case LLAMA_ROPE_TYPE_NEOX: break;
            default: why = "its positions are more than one number (M-RoPE)";
        }
    }
    if (why) {
        fail(KVP_ERR_UNSUPPORTED, "a model of architecture '%s' cannot have a bounded cache: %s. Load it without kv_budget.",
             arch.c_str(), why);
    }
}

// Memory for blobs: grows, is never zeroed, and is kept, so that an eviction does not fault its pages in anew.
class byte_buffer {
public:
    uint8_t * room_for(size_t size) {
        if (size > capacity) {
            bytes.reset(); // frees before it takes: the old content is never needed
            capacity = 0;
            bytes.reset(new uint8_t[size]);
            capacity = size;
        }
        return bytes.get();
    }
    uint8_t * data() { return bytes.get(); }

private:
    std::unique_ptr<uint8_t[]> bytes;
    size_t                     capacity = 0;
};

// Rows of tokens: in a state blob, or (the layers in host memory) in the cache itself.
struct token_rows {
    bool                    v_trans = false;
    std::vector<layer_rows> layers;
    std::vector<uint32_t>   order; // where each token lies there, in ascending position order
    bool                    in_place = false;
};

key_turn turning_of(const kvp_key_turn * turn, uint32_t rotation) {
    key_turn how;
    if (turn) {
        if (!turn->frequency || !turn->turn || turn->n_pairs == 0) {
            fail(KVP_ERR_ARGUMENT, "a turn of keys needs frequencies, turns and at least one pair");
        }
        how = { turn->frequency, turn->turn, turn->n_pairs, turn->neox != 0, rotation };
    }
    return how;
}

} // namespace

struct kvp_cache {
    llama_context *      ctx;
    llama_memory_t       mem;
    kvp_cache_shape      shape{};
    byte_buffer          blob; // reused between reads
    std::vector<float>   rows; // one layer's keys or values

    kvp_watch *             watch = nullptr;
    std::optional<in_place> place;       // where the cache lies, if that is known
    std::string             why_not;     // else
    uint64_t                crossed = 0; // bytes of llama.cpp's states, taken and given
    uint32_t                packed = 0, packed_as_state = 0;

    // Clears an empty context again after it has been tried out.
    struct clear_on_exit {
        kvp_cache & cache;
        ~clear_on_exit() {
            llama_memory_clear(cache.mem, true);
            llama_perf_context_reset(cache.ctx);
            if (cache.place) {
                cache.place->cells.clear();
            }
            cache.packed_as_state = 0;
            cache.crossed         = 0;
        }
    };

    // The state of a sequence, in `blob`; returns its size. llama.cpp sizes a state by a full dry run; an
    // upper bound saves that where it is known.
    size_t take_state(llama_seq_id seq, size_t upper_bound) {
        const size_t size = upper_bound > 0 ? upper_bound : llama_state_seq_get_size(ctx, seq);
        const size_t got  = llama_state_seq_get_data(ctx, blob.room_for(size), size, seq);
        if (got == 0) {
            fail(KVP_ERR_RUNTIME, "llama.cpp could not write its state into %zu bytes: the cache could not be read", size);
        }
        crossed += got;
        return got;
    }

    // Takes the blob of the tokens at [p0, p1). Invariant: SEQ_READ is empty before and after.
    state_blob read_blob(int32_t p0, int32_t p1, size_t upper_bound = 0) {
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
    size_t blob_bound(uint32_t n) const {
        const size_t per_layer = 32; // types and sizes of K and V
        return shape.has_window ? 0 : 64 + n * 12 + shape.n_layer * per_layer + n * shape.bytes_per_cell;
    }

    void refuse_if_not_empty() const {
        for (uint32_t s = 0; s < llama_n_seq_max(ctx); ++s) {
            if (llama_memory_seq_pos_max(mem, (llama_seq_id) s) >= 0) {
                fail(KVP_ERR_ARGUMENT, "the context already holds tokens: a cache can only be opened on an empty context");
            }
        }
    }

    void decode(llama_token * tokens, int32_t n, int32_t start = 0) {
        const int32_t step = std::min<int32_t>(n, (int32_t) llama_n_batch(ctx)); // a batch above n_batch aborts the process
        for (int32_t i = 0; i < n; i += step) {
            llama_batch            batch = llama_batch_get_one(tokens + i, std::min(step, n - i));
            std::vector<llama_pos> positions(batch.n_tokens);
            std::iota(positions.begin(), positions.end(), start + i);
            batch.pos = positions.data();
            if (llama_decode(ctx, batch) != 0) {
                fail(KVP_ERR_RUNTIME, "llama.cpp could not decode %d tokens in the new context of %u cells", n, llama_n_ctx(ctx));
            }
        }
    }

    void set_state(const uint8_t * bytes, size_t size, int32_t newest);
    void find_place(const blob_cache & trial);
    void pack(const pack_plan & plan);
    bool pack_in_place(const pack_plan & plan, int32_t newest);
    bool thins_window(const pack_plan & plan, const std::vector<uint32_t> & survivors) const;
    void close_up(const int32_t * positions, uint32_t n);
    [[noreturn]] void lose_all(const error & e);
    bool check_cells(const int32_t * present, uint32_t n);
    void restore(const uint8_t * bytes, size_t size, const int32_t * present, uint32_t n);
    void check_packing();

    void open();
    void learn_shape(const state_blob & state, const llama_model * model, const std::string & arch);

    // Calls each(il, keys or values as f32 [n, n_head_kv * head_size] in ascending position order) for the
    // layers that are not on a device.
    template <typename Each> void each_layer(const token_rows & tokens, bool want_v, Each each) {
        const size_t n_values = size_t(shape.n_head_kv) * (want_v ? shape.head_size_v : shape.head_size_k);
        rows.resize(tokens.order.size() * n_values);
        for (uint32_t il = 0; il < shape.n_layer; ++il) {
            const layer_rows & layer = tokens.layers[il];
            if (!layer.k) {
                continue;
            }
            if (want_v) {
                read_v(layer, tokens.v_trans, tokens.order, n_values, shape.v_rotation, rows.data());
            } else {
                read_k(layer, tokens.order, n_values, shape.k_rotation, rows.data());
            }
            each(il, rows.data());
        }
    }

    // Where rows may be: in host memory or a state; on devices, too, where those of layers on them are null;
    // or in a state alone.
    enum class from { host, anywhere, state };

    // The rows of the tokens at [p0, p1), checked against what the caller expects there; fills positions.
    token_rows find_rows(int32_t p0, int32_t p1, uint32_t n, int32_t * positions, from where) {
        if (p0 < 0 || p1 < p0 || !positions) {
            fail(KVP_ERR_ARGUMENT, "a position range must be 0 <= p0 <= p1 with room for its positions, not [%d, %d)", p0, p1);
        }
        if (place && n > 0 && (where == from::anywhere || (where == from::host && place->on_host()))) {
            const int32_t newest = llama_memory_seq_pos_max(mem, SEQ_CHAT);
            const auto    held   = place->cells.positions(p0, std::min(p1, newest + 1));
            if (held.size() == n) {
                std::copy(held.begin(), held.end(), positions);
                token_rows found{ shape.v_transposed != 0, place->rows(), place->cells.find(positions, n), true };
                if (!found.order.empty()) {
                    llama_synchronize(ctx);
                    return found;
                }
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

    // Calls on_device(rows) for tokens whose cells are known and then on_host(rows), which sees the layers that
    // are not on a device; where a device is not able to, on_host alone, with all layers.
    template <typename Device, typename Host>
    void score(int32_t p0, int32_t p1, uint32_t n, int32_t * positions, Device on_device, Host on_host) {
        token_rows tokens = find_rows(p0, p1, n, positions, from::anywhere);
        if (n > 0 && tokens.in_place) {
            try {
                on_device(tokens);
            } catch (const error & e) {
                if (e.code != KVP_ERR_UNSUPPORTED && e.code != KVP_ERR_MEMORY) {
                    throw;
                }
                tokens = find_rows(p0, p1, n, positions, from::state);
            }
        }
        if (n > 0) {
            on_host(tokens);
        }
    }

    static std::vector<uint32_t> ascending(const std::vector<int32_t> & positions) {
        std::vector<uint32_t> order(positions.size());
        std::iota(order.begin(), order.end(), 0u);
        std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return positions[a] < positions[b]; });
        return order;
    }

    // Removes positions [p0, p1) of the conversation.
    void remove(int32_t p0, int32_t p1) {
        if (!llama_memory_seq_rm(mem, SEQ_CHAT, p0, p1)) {
            fail(KVP_ERR_RUNTIME, "llama.cpp would not remove positions [%d, %d) from its cache", p0, p1);
        }
        if (place) {
            place->cells.remove(p0, p1 < 0 ? INT32_MAX : p1);
        }
    }
};

void kvp_cache::learn_shape(const state_blob & state, const llama_model * model, const std::string & arch) {
    const int64_t n_head     = llama_model_n_head(model);
    const int64_t per_head   = n_head > 0 ? llama_model_n_embd(model) / n_head : 0;
    const int64_t head_k     = meta_int(model, arch + ".attention.key_length", per_head);
    const int64_t head_v     = meta_int(model, arch + ".attention.value_length", per_head);
    const auto    values     = [](ggml_type type, size_t row) { return int64_t(row / ggml_type_size(type)) * ggml_blck_size(type); };
    const auto &  first      = state.base.layers.front();
    const int64_t n_values_k = values(first.type_k, first.k_row);
    const int64_t n_values_v = values(first.type_v, first.v_row);

    if (head_k <= 0 || head_v <= 0 || n_values_k % head_k != 0 || n_values_v % head_v != 0 ||
        n_values_k / head_k != n_values_v / head_v) {
        fail(KVP_ERR_UNSUPPORTED,
             "a model of architecture '%s' cannot have a bounded cache: its rows of %lld key and %lld value numbers are not "
             "whole heads of %lld and %lld. Load it without kv_budget.",
             arch.c_str(), (long long) n_values_k, (long long) n_values_v, (long long) head_k, (long long) head_v);
    }
    for (const layer_rows & layer : state.base.layers) {
        if (layer.k_row != first.k_row || layer.v_row != first.v_row || layer.type_k != first.type_k || layer.type_v != first.type_v) {
            fail(KVP_ERR_UNSUPPORTED,
                 "a model of architecture '%s' cannot have a bounded cache: its layers differ in the size of their KV heads. "
                 "Load it without kv_budget.",
                 arch.c_str());
        }
    }
    const rotation rot   = rotation_of(first.type_k, first.type_v, (uint32_t) head_k, (uint32_t) head_v);
    shape.n_layer        = (uint32_t) state.base.layers.size();
    shape.n_head_kv      = (uint32_t) (n_values_k / head_k);
    shape.head_size_k    = (uint32_t) head_k;
    shape.head_size_v    = (uint32_t) head_v;
    shape.type_k         = first.type_k;
    shape.type_v         = first.type_v;
    shape.v_transposed   = state.base.v_trans;
    shape.has_window     = state.has_window;
    shape.k_rotation     = rot.k;
    shape.v_rotation     = rot.v;
    shape.bytes_per_cell = uint64_t(shape.n_layer) * (first.k_row + first.v_row);
}

void kvp_cache::open() {
    const llama_model * model = llama_get_model(ctx);
    const std::string   arch  = architecture(model);
    refuse_unsupported_model(model, arch);
    mem = llama_get_memory(ctx);
    if (!mem) {
        fail(KVP_ERR_UNSUPPORTED, "a model of architecture '%s' has no KV cache, so there is nothing to bound", arch.c_str());
    }
    if (llama_n_seq_max(ctx) < 2) {
        fail(KVP_ERR_ARGUMENT, "the context must be made with n_seq_max >= 2 and kv_unified = true, so that tokens can be tagged");
    }
    // Between separate streams llama_memory_seq_cp copies, and aborts the process on a partial range.
    if (llama_n_ctx_seq(ctx) != llama_n_ctx(ctx)) {
        fail(KVP_ERR_ARGUMENT, "the context must be made with kv_unified = true: its %u cells are split into parts of %u",
             llama_n_ctx(ctx), llama_n_ctx_seq(ctx));
    }
    refuse_if_not_empty();

    // Three real tokens tell more than any promise: can they be read, can the middle one be removed?
    const clear_on_exit cleanup{ *this };

    llama_token bos = llama_vocab_bos(llama_model_get_vocab(model));
    if (bos < 0) {
        bos = 0;
    }
    llama_token tokens[3] = { bos, bos, bos };
    if (watch) {
        watch->look();
    }
    decode(tokens, 3);
    const state_blob before = read_blob(0, 3);
    if (before.base.pos != std::vector<int32_t>{ 0, 1, 2 }) {
        fail(KVP_ERR_LAYOUT, "three tokens were decoded, but llama.cpp's state blob names %zu cells", before.base.pos.size());
    }
    learn_shape(before, model, arch);
    find_place(before.base);

    const bool       removed = llama_memory_seq_rm(mem, SEQ_CHAT, 1, 2);
    const state_blob after   = read_blob(0, 3);
    if (!removed || after.base.pos != std::vector<int32_t>{ 0, 2 }) {
        fail(KVP_ERR_UNSUPPORTED,
             "a model of architecture '%s' cannot have a bounded cache: llama.cpp cannot remove tokens from the middle of it. "
             "Load it without kv_budget.",
             arch.c_str());
    }
}

void kvp_cache::find_place(const blob_cache & trial) {
    if (!watch) {
        why_not = "nobody watches where it lies";
        return;
    }
    try {
        place.emplace(*watch, trial, shape, llama_n_ctx(ctx));
    } catch (const error & e) {
        if (e.code != KVP_ERR_UNSUPPORTED) {
            throw;
        }
        why_not = e.message;
    }
}

void kvp_cache::pack(const pack_plan & plan) {
    const int32_t newest = llama_memory_seq_pos_max(mem, SEQ_CHAT);
    if (plan.n == 0 || plan.n_keep == 0 || plan.present[plan.n - 1] != newest) {
        fail(KVP_ERR_ARGUMENT, "the newest token is at position %d, not %d: the table of kept tokens is out of date", newest,
             plan.n ? plan.present[plan.n - 1] : -1);
    }
    const int32_t last = plan.positions[plan.n_keep - 1];
    if (plan.turning.frequency && shape.has_window) {
        fail(KVP_ERR_UNSUPPORTED, "keys of a model with sliding-window layers cannot be turned while they are packed");
    }
    if (!plan.turning.frequency && last != newest) {
        fail(KVP_ERR_ARGUMENT, "the newest token must stay at position %d, from which llama.cpp continues, not %d", newest, last);
    }
    if (pack_in_place(plan, newest)) {
        ++packed;
        return;
    }
    const size_t size   = take_state(SEQ_CHAT, blob_bound(plan.n));
    uint8_t *    bytes  = blob.data();
    const size_t new_size = pack_state(bytes, size, SEQ_CHAT, plan);

    // It was packed in place to spare the memory of a second state, so from here on there is no way back.
    set_state(bytes, new_size, last);
    ++packed_as_state;
}

// Whether it was possible; if not, nothing has changed.
bool kvp_cache::pack_in_place(const pack_plan & plan, int32_t newest) {
    if (!check_rows(plan) || !place || plan.turning.frequency) {
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
        lose_all(e);
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
        close_up(plan.positions, plan.n_keep);
    } catch (const error & e) {
        lose_all(e);
    }
    return true;
}

void kvp_cache::lose_all(const error & e) {
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
// tensor's blocks for that of its values, so these few rows go through the host.
void kvp_cache::close_up(const int32_t * positions, uint32_t n) {
    std::vector<uint32_t> cells = place->cells.find(positions, n);
    const auto   high  = std::find_if(cells.begin(), cells.end(), [&](uint32_t cell) { return cell >= n; });
    const bool   pieces = shape.v_transposed && !place->on_host(); // one for every column: slower than the holes
    if (cells.empty() || high == cells.end() || shape.has_window || pieces) {
        return;
    }
    const auto            first = uint32_t(high - cells.begin());
    std::vector<uint32_t> from(high, cells.end()), to;
    std::vector<bool>     used(n);
    for (uint32_t i = 0; i < first; ++i) {
        used[cells[i]] = true; // below n, as it is before the first that is not
    }
    for (uint32_t cell = 0; to.size() < from.size(); ++cell) {
        if (!used[cell]) {
            to.push_back(cell);
        }
    }
    const std::vector<float>    before = place->look(from);
    const bool                  quantised = ggml_is_quantized(ggml_type(shape.type_k)) || ggml_is_quantized(ggml_type(shape.type_v));
    const llama_state_seq_flags flags =
        place->on_host() || quantised ? LLAMA_STATE_SEQ_FLAGS_NONE : LLAMA_STATE_SEQ_FLAGS_ON_DEVICE;
    const size_t                room   = blob_bound(flags ? 0 : uint32_t(from.size())) + 12 * from.size();
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
    if (!place->on_host() && quantised) {
        crossed += 2 * size;
    }
    llama_memory_seq_cp(mem, SEQ_READ, SEQ_CHAT, -1, -1);
    llama_memory_seq_rm(mem, SEQ_READ, -1, -1);
    // llama.cpp tells nobody which cells it took; if not the lowest free ones, they are not known
    if (place->look(to) == before) {
        std::copy(to.begin(), to.end(), cells.begin() + first);
        place->cells.assign(positions, cells);
    } else {
        place->cells.clear();
    }
}

// Compares the cells followed with llama.cpp's own state; false if they are not known.
bool kvp_cache::check_cells(const int32_t * present, uint32_t n) {
    const auto cells = place ? place->cells.find(present, n) : std::vector<uint32_t>();
    if (cells.empty()) {
        return false;
    }
    llama_synchronize(ctx);
    const uint64_t   before = crossed;
    const size_t     size   = take_state(SEQ_CHAT, blob_bound(n));
    const state_blob state  = parse_state_blob(blob.data(), size, SEQ_CHAT);
    crossed                 = before; // no part of an eviction
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

void kvp_cache::restore(const uint8_t * bytes, size_t size, const int32_t * present, uint32_t n) {
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
    crossed += size;
    if (place) {
        // The cells of an empty cache are taken in order.
        const state_blob state = parse_state_blob(bytes, size, SEQ_CHAT);
        place->cells.clear();
        crossed += place->on_host() ? 0 : state.base.pos.size() * state.base.layers.front().k_row;
        if (place->begins_with(state.base)) {
            std::vector<uint32_t> cells(state.base.pos.size());
            std::iota(cells.begin(), cells.end(), 0u);
            place->cells.assign(state.base.pos.data(), cells);
        }
    }
}

void kvp_cache::check_packing() {
    refuse_if_not_empty();
    const clear_on_exit cleanup{ *this };

    constexpr uint32_t  N       = 8;
    const llama_model * model   = llama_get_model(ctx);
    const int32_t       n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    const int32_t       start   = std::max(0, std::min<int32_t>(1000, llama_model_n_ctx_train(model) - int32_t(2 * N)));
    llama_token         tokens[N + 1];
    for (uint32_t i = 0; i <= N; ++i) {
        tokens[i] = (llama_token) (int64_t(n_vocab) * (i + 1) / (N + 2)); // any, as long as they differ
    }
    const auto next_logits = [&] {
        decode(tokens + N, 1, start + N);
        const float * logits = llama_get_logits_ith(ctx, -1);
        if (!logits) {
            fail(KVP_ERR_UNSUPPORTED, "per-head eviction needs a context that gives logits");
        }
        return std::vector<float>(logits, logits + n_vocab);
    };
    decode(tokens, N, start);
    const std::vector<float> before = next_logits();
    llama_memory_seq_rm(mem, SEQ_CHAT, start + N, -1);

    // every head in an order of its own, and all rows but the last a thousand positions away
    const uint32_t       n_heads = shape.n_layer * shape.n_head_kv;
    std::vector<int32_t> present(N), positions(N), keep(size_t(n_heads) * N);
    std::iota(present.begin(), present.end(), start);
    std::iota(positions.begin(), positions.end(), 0);
    positions[N - 1] = present[N - 1];
    for (uint32_t g = 0; g < n_heads; ++g) {
        for (uint32_t i = 0; i < N; ++i) {
            keep[size_t(g) * N + i] = int32_t((N - 1 - i + g % 3) % N);
        }
    }
    pack_plan plan;
    plan.n_layer   = shape.n_layer;
    plan.n_head_kv = shape.n_head_kv;
    plan.n = plan.n_keep = N;
    plan.present   = present.data();
    plan.positions = positions.data();
    plan.keep      = keep.data();
    pack(plan);
    const std::vector<float> after = next_logits();

    double mean = 0.0, variance = 0.0, error = 0.0;
    for (float x : before) {
        mean += x / n_vocab;
    }
    for (int32_t i = 0; i < n_vocab; ++i) {
        variance += (before[i] - mean) * (before[i] - mean);
        error += (double(after[i]) - before[i]) * (double(after[i]) - before[i]);
    }
    // Root mean square over the logits' standard deviation. Measured on random models: below 0.001 where
    // rows are free to move (the order of sums; a mixture's router may tip, hence the margin), 0.8 with ALiBi.
    if (!(error <= 0.25 * 0.25 * variance)) {
        fail(KVP_ERR_UNSUPPORTED,
             "a model of architecture '%s' cannot have per-head eviction: its attention depends on which cell a token lies in "
             "(ALiBi?). Use granularity='token'.",
             architecture(model).c_str());
    }
}

extern "C" {

int32_t      kvp_abi_version(void) { return KVP_ABI_VERSION; }
const char * kvp_built_for(void) { return KVP_BUILT_FOR; }
const char * kvp_built_llama_version(void) { return KVP_BUILT_LLAMA_VERSION; }
const char * kvp_loaded_llama_version(void) { return llama_version(); }

int32_t kvp_cache_open(llama_context * ctx, kvp_watch * watch, kvp_cache ** cache, kvp_error * err) {
    return guard(err, [&] {
        if (!ctx || !cache) {
            fail(KVP_ERR_ARGUMENT, "kvp_cache_open: ctx and cache must not be NULL");
        }
        std::unique_ptr<kvp_cache> opened(new kvp_cache{});
        opened->ctx   = ctx;
        opened->watch = watch;
        opened->open();
        *cache = opened.release();
    });
}

void kvp_cache_close(kvp_cache * cache) { delete cache; }

void kvp_cache_get_shape(const kvp_cache * cache, kvp_cache_shape * shape) {
    if (cache && shape) {
        *shape = cache->shape;
    }
}

int32_t kvp_cache_read(kvp_cache * cache, int32_t p0, int32_t p1, uint32_t n, int32_t * positions, float * keys,
                       float * values, kvp_error * err) {
    return guard(err, [&] {
        if (!cache) {
            fail(KVP_ERR_ARGUMENT, "kvp_cache_read: cache must not be NULL");
        }
        const token_rows tokens = cache->find_rows(p0, p1, n, positions, kvp_cache::from::host);
        if (n == 0) {
            return;
        }
        const uint32_t n_head = cache->shape.n_head_kv;
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
            cache->each_layer(tokens, false, spread(keys, cache->shape.head_size_k));
        }
        if (values) {
            cache->each_layer(tokens, true, spread(values, cache->shape.head_size_v));
        }
    });
}

int32_t kvp_cache_score(kvp_cache * cache, int32_t scorer, int32_t p0, int32_t p1, uint32_t n, int32_t * positions,
                        float * scores, kvp_error * err) {
    return guard(err, [&] {
        if (!cache || !scores) {
            fail(KVP_ERR_ARGUMENT, "kvp_cache_score: cache and scores must not be NULL");
        }
        if (scorer != KVP_SCORER_KNORM && scorer != KVP_SCORER_KEYDIFF) {
            fail(KVP_ERR_ARGUMENT, "there is no native scorer number %d", scorer);
        }
        const auto   score  = scorer == KVP_SCORER_KNORM ? score_knorm : score_keydiff;
        const size_t n_head = cache->shape.n_head_kv;
        cache->score(
            p0, p1, n, positions, [&](const token_rows & tokens) { cache->place->score(scorer, tokens.order, scores); },
            [&](const token_rows & tokens) {
                cache->each_layer(tokens, false, [&](uint32_t il, const float * keys) {
                    score(keys, n, n_head, cache->shape.head_size_k, scores + il * n_head * n);
                });
            });
    });
}

int32_t kvp_cache_score_policy(kvp_cache * cache, kvp_policy * policy, int32_t p0, int32_t p1, uint32_t n,
                               const int32_t * tokens, float * scores, kvp_error * err) {
    return guard(err, [&] {
        if (!cache || !policy || (n > 0 && (!tokens || !scores))) {
            fail(KVP_ERR_ARGUMENT, "kvp_cache_score_policy: cache, policy, tokens and scores must not be NULL");
        }
        const kvp_cache_shape &  c = cache->shape;
        const kvp_policy_shape & s = policy->network.shape();
        if (s.n_layer != c.n_layer || s.n_head_kv != c.n_head_kv || s.head_size_k != c.head_size_k ||
            s.head_size_v != c.head_size_v) {
            fail(KVP_ERR_ARGUMENT, "the policy scores %u layers x %u KV heads x %u+%u, and the cache holds %u x %u x %u+%u",
                 s.n_layer, s.n_head_kv, s.head_size_k, s.head_size_v, c.n_layer, c.n_head_kv, c.head_size_k, c.head_size_v);
        }
        check_tokens(tokens, n);
        std::vector<int32_t> positions(n + 1); // never without an address
        const auto           slots = with_gaps(tokens, n, s.context / 2);
        const size_t         H = c.n_head_kv, dk = c.head_size_k, dv = c.head_size_v;
        std::vector<float>   values(n * H * dv);
        cache->score(
            p0, p1, n, positions.data(),
            [&](const token_rows & found) { cache->place->score(policy->network, slots, found.order, scores); },
            [&](const token_rows & found) {
                cache->each_layer(found, false, [&](uint32_t il, const float * keys) {
                    read_v(found.layers[il], found.v_trans, found.order, H * dv, c.v_rotation, values.data());
                    policy->network.score(il, { keys, H * dk, dk }, { values.data(), H * dv, dv }, slots.data(), slots.size(), n,
                                          llama_n_threads(cache->ctx), scores + il * H * n);
                });
            });
    });
}

int32_t kvp_cache_remove(kvp_cache * cache, const int32_t * present, const uint8_t * keep, uint32_t n, uint32_t * n_ranges,
                         kvp_error * err) {
    return guard(err, [&] {
        if (n_ranges) {
            *n_ranges = 0;
        }
        if (!cache || (n > 0 && (!present || !keep))) {
            fail(KVP_ERR_ARGUMENT, "kvp_cache_remove: cache, present and keep must not be NULL");
        }
        if (n == 0) {
            return;
        }
        for (uint32_t i = 0; i < n; ++i) {
            if (present[i] < 0 || (i > 0 && present[i] <= present[i - 1])) {
                fail(KVP_ERR_ARGUMENT, "present positions must ascend, but entry %u is %d", i, present[i]);
            }
        }
        const int32_t newest = llama_memory_seq_pos_max(cache->mem, SEQ_CHAT);
        if (present[n - 1] != newest) {
            fail(KVP_ERR_ARGUMENT, "the newest token is at position %d, not %d: the table of kept tokens is out of date", newest,
                 present[n - 1]);
        }
        if (!keep[n - 1]) {
            fail(KVP_ERR_ARGUMENT, "the newest token (position %d) cannot be removed: llama.cpp continues from it", newest);
        }
        // Positions between two present ones hold nothing, so a range may run across them: one call
        // per run of removed entries, and no fewer calls can leave the kept entries between the runs.
        for (uint32_t i = 0; i < n;) {
            if (keep[i]) {
                ++i;
                continue;
            }
            uint32_t end = i;
            while (!keep[end]) {
                ++end; // stops: keep[n - 1] is set
            }
            cache->remove(present[i], present[end - 1] + 1);
            if (n_ranges) {
                ++*n_ranges;
            }
            i = end;
        }
    });
}

int32_t kvp_cache_move(kvp_cache * cache, const int32_t * present, const int32_t * positions, uint32_t n, kvp_error * err) {
    return guard(err, [&] {
        if (!cache || (n > 0 && (!present || !positions))) {
            fail(KVP_ERR_ARGUMENT, "kvp_cache_move: cache, present and positions must not be NULL");
        }
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
            llama_memory_seq_add(cache->mem, SEQ_CHAT, present[i], present[end - 1] + 1, positions[i] - present[i]);
            i = end;
        }
        if (cache->place) {
            cache->place->cells.rename(present, positions, n);
        }
    });
}

int32_t kvp_cache_appended(kvp_cache * cache, int32_t first, uint32_t n, kvp_error * err) {
    return guard(err, [&] {
        if (!cache || first < 0) {
            fail(KVP_ERR_ARGUMENT, "kvp_cache_appended: there is no cache, or position %d", first);
        }
        if (cache->place) {
            cache->place->cells.append(first, n, cache->watch->take(n));
        }
    });
}

void kvp_cache_forget(kvp_cache * cache) {
    if (cache && cache->place) {
        cache->place->cells.clear();
    }
}

void kvp_cache_get_place(const kvp_cache * cache, kvp_cache_place * place) {
    if (cache && place) {
        *place           = {};
        place->known     = cache->place.has_value();
        place->on_device = cache->place && !cache->place->on_host();
        place->can_pack  = cache->place && cache->place->can_pack();
        place->packed    = cache->packed;
        place->packed_as_state = cache->packed_as_state;
        place->crossed   = cache->crossed + (cache->place ? cache->place->crossed() : 0);
        std::snprintf(place->where, sizeof(place->where), "%s", cache->place ? cache->place->devices().c_str() : cache->why_not.c_str());
    }
}

int32_t kvp_cache_check_cells(kvp_cache * cache, const int32_t * present, uint32_t n, uint32_t * known, kvp_error * err) {
    return guard(err, [&] {
        if (!cache || !known || (n > 0 && !present)) {
            fail(KVP_ERR_ARGUMENT, "kvp_cache_check_cells: cache, present and known must not be NULL");
        }
        *known = cache->check_cells(present, n);
    });
}

int32_t kvp_cache_check_packing(kvp_cache * cache, kvp_error * err) {
    return guard(err, [&] {
        if (!cache) {
            fail(KVP_ERR_ARGUMENT, "kvp_cache_check_packing: cache must not be NULL");
        }
        cache->check_packing();
    });
}

int32_t kvp_cache_pack(kvp_cache * cache, const int32_t * present, uint32_t n, const int32_t * keep, const int32_t * positions,
                       uint32_t n_keep, const kvp_key_turn * turn, kvp_error * err) {
    return guard(err, [&] {
        if (!cache || !present || !keep || !positions) {
            fail(KVP_ERR_ARGUMENT, "kvp_cache_pack: cache, present, keep and positions must not be NULL");
        }
        const kvp_cache_shape & s = cache->shape;
        cache->pack({ s.n_layer, s.n_head_kv, n, n_keep, present, keep, positions, turning_of(turn, s.k_rotation) });
    });
}

int32_t kvp_cache_restore(kvp_cache * cache, const uint8_t * blob, size_t size, const int32_t * present, uint32_t n,
                          kvp_error * err) {
    return guard(err, [&] {
        if (!cache || !blob || !present) {
            fail(KVP_ERR_ARGUMENT, "kvp_cache_restore: cache, blob and present must not be NULL");
        }
        cache->restore(blob, size, present, n);
    });
}

int32_t kvp_state_pack(uint8_t * blob, size_t size, int32_t seq_id, uint32_t n_layer, uint32_t n_head_kv,
                       const int32_t * present, uint32_t n, const int32_t * keep, const int32_t * positions, uint32_t n_keep,
                       const kvp_key_turn * turn, uint32_t rotation, size_t * packed_size, kvp_error * err) {
    return guard(err, [&] {
        if (!blob || !present || !keep || !positions || !packed_size) {
            fail(KVP_ERR_ARGUMENT, "kvp_state_pack: blob, present, keep, positions and packed_size must not be NULL");
        }
        *packed_size = pack_state(blob, size, seq_id,
                                  { n_layer, n_head_kv, n, n_keep, present, keep, positions, turning_of(turn, rotation) });
    });
}

} // extern "C"
