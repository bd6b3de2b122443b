#include "cache/context_memory.h"

#include "error.h"

#include <algorithm>
#include <numeric>

namespace kvp {

std::string architecture(const llama_model * model) {
    char text[64] = "";
    llama_model_meta_val_str(model, "general.architecture", text, sizeof(text));
    return text;
}

context_memory::context_memory(llama_context * ctx) : ctx(ctx), mem(llama_get_memory(ctx)) {
    if (!mem) {
        fail(KVP_ERR_UNSUPPORTED, "a model of architecture '%s' has no KV cache, so there is nothing to bound",
             architecture(model()).c_str());
    }
    if (llama_n_seq_max(ctx) < 2) {
        fail(KVP_ERR_ARGUMENT, "the context must be made with n_seq_max >= 2 and kv_unified = true, so that tokens can be tagged");
    }
    // Between separate streams llama_memory_seq_cp copies, and aborts the process on a partial range.
    if (llama_n_ctx_seq(ctx) != llama_n_ctx(ctx)) {
        fail(KVP_ERR_ARGUMENT, "the context must be made with kv_unified = true: its %u cells are split into parts of %u",
             llama_n_ctx(ctx), llama_n_ctx_seq(ctx));
    }
}

bool context_memory::is_empty() const {
    for (uint32_t s = 0; s < llama_n_seq_max(ctx); ++s) {
        if (llama_memory_seq_pos_max(mem, (llama_seq_id) s) >= 0) {
            return false;
        }
    }
    return true;
}

int32_t context_memory::newest() const { return llama_memory_seq_pos_max(mem, SEQ_CHAT); }

int32_t context_memory::oldest() const { return llama_memory_seq_pos_min(mem, SEQ_CHAT); }

void context_memory::decode(llama_token * tokens, int32_t n, int32_t start) {
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

bool context_memory::try_to_remove(kvp_llama_position p0, kvp_llama_position p1) { return llama_memory_seq_rm(mem,
                                   SEQ_CHAT, p0, p1); }

void context_memory::remove(kvp_llama_position p0, kvp_llama_position p1) {
    if (!try_to_remove(p0, p1)) {
        fail(KVP_ERR_RUNTIME, "llama.cpp would not remove positions [%d, %d) from its cache", p0, p1);
    }
}

void context_memory::shift(kvp_llama_position p0, kvp_llama_position p1, int32_t by) { llama_memory_seq_add(mem,
                           SEQ_CHAT, p0, p1, by); }

void context_memory::clear() {
    llama_memory_seq_rm(mem, SEQ_READ, -1, -1);
    llama_memory_seq_rm(mem, SEQ_CHAT, -1, -1);
}

void context_memory::reset() {
    llama_memory_clear(mem, true);
    llama_perf_context_reset(ctx);
    transferred = 0;
}

size_t context_memory::take(llama_seq_id seq, size_t bound, bool counted) {
    size_t size = bound > 0 ? bound : llama_state_seq_get_size(ctx, seq);
    size_t got  = llama_state_seq_get_data(ctx, buffer.room_for(size), size, seq);
    if (got == 0 && bound > 0) { // it holds more than the caller expects, which is to be told
        size = llama_state_seq_get_size(ctx, seq);
        got  = llama_state_seq_get_data(ctx, buffer.room_for(size), size, seq);
    }
    if (got == 0) {
        fail(KVP_ERR_RUNTIME, "llama.cpp could not write its state into %zu bytes: the cache could not be read", size);
    }
    if (counted) {
        transferred += got;
    }
    return got;
}

context_memory::bytes context_memory::take_state(size_t bound, bool counted) {
    const size_t size = take(SEQ_CHAT, bound, counted);
    return { buffer.data(), size };
}

state_blob context_memory::read(kvp_llama_position p0, kvp_llama_position p1, size_t bound) {
    llama_memory_seq_cp(mem, SEQ_CHAT, SEQ_READ, p0, p1); // in a unified cache this only tags cells
    size_t size = 0;
    try {
        size = take(SEQ_READ, bound, true);
    } catch (...) {
        llama_memory_seq_rm(mem, SEQ_READ, -1, -1);
        throw;
    }
    llama_memory_seq_rm(mem, SEQ_READ, -1, -1);
    return parse_state_blob(buffer.data(), size, SEQ_READ);
}

void context_memory::set_state(const uint8_t * data, size_t size, int32_t wanted) {
    const size_t taken = llama_state_seq_set_data(ctx, data, size, SEQ_CHAT);
    if (taken != size || newest() != wanted) {
        llama_memory_seq_rm(mem, SEQ_CHAT, -1, -1);
        fail(KVP_ERR_RUNTIME,
             "llama.cpp took %zu of the %zu bytes of a changed cache. The cache is empty now, and the conversation must be "
             "read again",
             taken, size);
    }
    transferred += size;
}

bool context_memory::reinsert(int32_t first, size_t bound, bool on_device, bool counted) {
    const llama_state_seq_flags flags = on_device ? LLAMA_STATE_SEQ_FLAGS_ON_DEVICE : LLAMA_STATE_SEQ_FLAGS_NONE;
    llama_memory_seq_cp(mem, SEQ_CHAT, SEQ_READ, first, -1);
    const size_t size = llama_state_seq_get_data_ext(ctx, buffer.room_for(bound), bound, SEQ_READ, flags);
    llama_memory_seq_rm(mem, SEQ_READ, -1, -1);
    if (size == 0) {
        return false;
    }
    remove(first, -1);
    if (llama_state_seq_set_data_ext(ctx, buffer.data(), size, SEQ_READ, flags) != size) {
        fail(KVP_ERR_RUNTIME, "llama.cpp did not take its newest tokens, from position %d on, back", first);
    }
    if (counted) {
        transferred += 2 * size;
    }
    llama_memory_seq_cp(mem, SEQ_READ, SEQ_CHAT, -1, -1);
    llama_memory_seq_rm(mem, SEQ_READ, -1, -1);
    return true;
}

} // namespace kvp
