// A context's KV cache as llama.cpp itself offers it: positions of a conversation, and states of it in memory. What
// goes through here knows nothing of where the cache lies.
#pragma once

#include "state/state_blob.h"
#include "kvp_edge.h"

#include "llama.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace kvp {

// The architecture that a model's metadata name.
std::string architecture(const llama_model * model);

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

class context_memory {
public:
    static constexpr llama_seq_id SEQ_CHAT = 0;
    static constexpr llama_seq_id SEQ_READ = 1; // tags the cells being read; empty between calls

    // Throws KVP_ERR_UNSUPPORTED where the model has no KV cache, and KVP_ERR_ARGUMENT where the context was not made
    // for two sequences in one cache.
    explicit context_memory(llama_context * ctx);

    const llama_model * model() const { return llama_get_model(ctx); }
    uint32_t            n_cells() const { return llama_n_ctx(ctx); }
    int32_t             n_threads() const { return llama_n_threads(ctx); }
    bool                is_empty() const; // in all sequences

    // Positions of the conversation: the newest is -1 where it is empty, the oldest is of a window cache, if there is one.
    int32_t newest() const;
    int32_t oldest() const;

    // Until what was decoded last has been computed.
    void wait() const { llama_synchronize(ctx); }

    // Reads tokens at positions start, start + 1, ...
    void decode(llama_token * tokens, int32_t n, int32_t start = 0);
    // The logits after the last token, or nullptr.
    const float * logits() const { return llama_get_logits_ith(ctx, -1); }

    // Removes positions [p0, p1) of the conversation; p1 < 0: all from p0 on.
    void remove(kvp_llama_position p0, kvp_llama_position p1);
    // Whether llama.cpp removes a position from the middle.
    bool try_to_remove(kvp_llama_position p0, kvp_llama_position p1);
    // Adds `by` to positions [p0, p1).
    void shift(kvp_llama_position p0, kvp_llama_position p1, int32_t by);
    // Empties the conversation, whatever state it is in.
    void clear();
    // Empties everything, as if nothing had been decoded.
    void reset();

    // -- states. Each is valid until the next is taken: they share one buffer. `bound`: bytes that it cannot exceed,
    // which spares llama.cpp a dry run that counts them; 0 if that is not known.
    struct bytes {
        uint8_t * data;
        size_t    size;
    };
    // The state of the whole conversation, not to be counted as carried where it only serves a check.
    bytes take_state(size_t bound, bool counted = true);
    // The tokens at [p0, p1) of it.
    state_blob read(kvp_llama_position p0, kvp_llama_position p1, size_t bound = 0);
    // Puts a state in the conversation's place, whose newest token must then be at position `newest`. A state that
    // llama.cpp does not take leaves the cache empty, never half full: KVP_ERR_RUNTIME.
    void set_state(const uint8_t * data, size_t size, int32_t newest);

    // The newest tokens, from position `first` on, taken out and put back in, so that they go to the lowest free
    // cells; as a state that stays on its device if `on_device`. False: nothing has changed. Throws KVP_ERR_RUNTIME
    // where they are gone.
    bool reinsert(int32_t first, size_t bound, bool on_device, bool counted);

    // Bytes of states that were taken and put in so far.
    uint64_t bytes_transferred() const { return transferred; }

private:
    size_t take(llama_seq_id seq, size_t bound, bool counted);

    llama_context * ctx;
    llama_memory_t  mem;
    byte_buffer     buffer;
    uint64_t        transferred = 0;
};

} // namespace kvp
