// Opening a cache: is it one that can lose its middle, what does it look like, and where does it lie?
#include "cache/cache.h"
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

// The context, if a cache of its model can be bounded.
llama_context * supported(llama_context * ctx) {
    const llama_model * model = llama_get_model(ctx);
    const char *        why   = nullptr;
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
             architecture(model).c_str(), why);
    }
    return ctx;
}

// An empty context that was tried out is cleared again, whatever happened.
template <typename Clear> struct at_exit_of_scope {
    Clear clear;
    ~at_exit_of_scope() { clear(); }
};
template <typename Clear> at_exit_of_scope(Clear) -> at_exit_of_scope<Clear>;

} // namespace

void kvp_cache::clear_again() {
    memory.reset();
    forget();
    packed_in_place = packed_as_state = 0;
    bytes_checked                     = 0;
}

void kvp_cache::refuse_if_not_empty() const {
    if (!memory.is_empty()) {
        fail(KVP_ERR_ARGUMENT, "the context already holds tokens: a cache can only be opened on an empty context");
    }
}

void kvp_cache::learn_shape(const state_blob & state, const std::string & arch) {
    const llama_model * model = memory.model();
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
    const hadamard_blocks blocks = hadamard_blocks_of(first.type_k, first.type_v, (uint32_t) head_k, (uint32_t) head_v);
    layout.n_layer          = (uint32_t) state.base.layers.size();
    layout.n_head_kv        = (uint32_t) (n_values_k / head_k);
    layout.head_size_k      = (uint32_t) head_k;
    layout.head_size_v      = (uint32_t) head_v;
    layout.type_k           = first.type_k;
    layout.type_v           = first.type_v;
    layout.v_transposed     = state.base.v_trans;
    layout.has_window       = state.has_window;
    layout.k_hadamard_block = blocks.k;
    layout.v_hadamard_block = blocks.v;
    layout.bytes_per_cell   = uint64_t(layout.n_layer) * (first.k_row + first.v_row);
}

kvp_cache::kvp_cache(llama_context * ctx, kvp_observer * observer) : memory(supported(ctx)) {
    const std::string arch = architecture(memory.model());
    refuse_if_not_empty();

    // Three real tokens tell more than any promise: can they be read, can the middle one be removed?
    const at_exit_of_scope cleanup{ [this] { clear_again(); } };

    llama_token bos = llama_vocab_bos(llama_model_get_vocab(memory.model()));
    if (bos < 0) {
        bos = 0;
    }
    llama_token                   tokens[3] = { bos, bos, bos };
    std::unique_ptr<cell_watcher> watcher;
    if (observer) {
        watcher = std::make_unique<cell_watcher>(observer->shared);
        watcher->follow_all();
    }
    memory.decode(tokens, 3);
    const state_blob before = memory.read(0, 3);
    if (before.base.pos != std::vector<int32_t>{ 0, 1, 2 }) {
        fail(KVP_ERR_LAYOUT, "three tokens were decoded, but llama.cpp's state blob names %zu cells", before.base.pos.size());
    }
    learn_shape(before, arch);
    find_location(std::move(watcher), before.base);

    const bool       removed = memory.try_to_remove(1, 2);
    const state_blob after   = memory.read(0, 3);
    if (!removed || after.base.pos != std::vector<int32_t>{ 0, 2 }) {
        fail(KVP_ERR_UNSUPPORTED,
             "a model of architecture '%s' cannot have a bounded cache: llama.cpp cannot remove tokens from the middle of it. "
             "Load it without kv_budget.",
             arch.c_str());
    }
}

void kvp_cache::find_location(std::unique_ptr<cell_watcher> watcher, const blob_cache & trial) {
    if (!watcher) {
        why_unknown = "the context is not observed";
        return;
    }
    try {
        location.emplace(std::move(watcher), trial, layout, memory.n_cells());
    } catch (const error & e) {
        if (e.code != KVP_ERR_UNSUPPORTED) {
            throw;
        }
        why_unknown = e.message;
    }
}

void kvp_cache::check_packing() {
    refuse_if_not_empty();
    const at_exit_of_scope cleanup{ [this] { clear_again(); } };

    constexpr uint32_t  N       = 8;
    const llama_model * model   = memory.model();
    const int32_t       n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    const int32_t       start   = std::max(0, std::min<int32_t>(1000, llama_model_n_ctx_train(model) - int32_t(2 * N)));
    llama_token         tokens[N + 1];
    for (uint32_t i = 0; i <= N; ++i) {
        tokens[i] = (llama_token) (int64_t(n_vocab) * (i + 1) / (N + 2)); // any, as long as they differ
    }
    const auto next_logits = [&] {
        memory.decode(tokens + N, 1, start + N);
        const float * logits = memory.logits();
        if (!logits) {
            fail(KVP_ERR_UNSUPPORTED, "per-head eviction needs a context that gives logits");
        }
        return std::vector<float>(logits, logits + n_vocab);
    };
    memory.decode(tokens, N, start);
    const std::vector<float> before = next_logits();
    memory.try_to_remove(start + N, -1);

    // every head in an order of its own, and all rows but the last a thousand positions away
    const uint32_t       n_heads = layout.n_layer * layout.n_head_kv;
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
    plan.n_layer   = layout.n_layer;
    plan.n_head_kv = layout.n_head_kv;
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
