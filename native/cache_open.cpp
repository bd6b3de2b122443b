// Opening a cache: is it one that can lose its middle, what does it look like, and where does it lie?
#include "cache.h"

#include "error.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <numeric>

using namespace kvp;

namespace {

int64_t meta_int(const llama_model * model, const std::string & key, int64_t fallback) {
    char text[64];
    return llama_model_meta_val_str(model, key.c_str(), text, sizeof(text)) > 0 ? std::strtoll(text, nullptr, 10) : fallback;
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

// An empty context that was tried out is cleared again, whatever happened.
template <typename Clear> struct at_exit_of_scope {
    Clear clear;
    ~at_exit_of_scope() { clear(); }
};
template <typename Clear> at_exit_of_scope(Clear) -> at_exit_of_scope<Clear>;

} // namespace

std::string kvp::architecture(const llama_model * model) {
    char text[64] = "";
    llama_model_meta_val_str(model, "general.architecture", text, sizeof(text));
    return text;
}

void kvp_cache::clear_again() {
    llama_memory_clear(mem, true);
    llama_perf_context_reset(ctx);
    if (place) {
        place->cells.clear();
    }
    packed_as_state = 0;
    bytes_transferred         = 0;
}

void kvp_cache::refuse_if_not_empty() const {
    for (uint32_t s = 0; s < llama_n_seq_max(ctx); ++s) {
        if (llama_memory_seq_pos_max(mem, (llama_seq_id) s) >= 0) {
            fail(KVP_ERR_ARGUMENT, "the context already holds tokens: a cache can only be opened on an empty context");
        }
    }
}

void kvp_cache::decode(llama_token * tokens, int32_t n, int32_t start) {
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
    shape.k_hadamard_block     = rot.k;
    shape.v_hadamard_block     = rot.v;
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
    const at_exit_of_scope cleanup{ [this] { clear_again(); } };

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

void kvp_cache::check_packing() {
    refuse_if_not_empty();
    const at_exit_of_scope cleanup{ [this] { clear_again(); } };

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
