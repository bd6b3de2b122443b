// kvp_capture: sees every node of a running graph and keeps the sums of its attention.
#include "observe/capture.h"

#include "error.h"
#include "observe/observer.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <utility>

namespace kvp {

size_t sums_per_head(uint32_t first, uint32_t block, uint32_t n_tokens) {
    size_t sum = 0;
    for (size_t end = first; end < n_tokens; end += block) {
        sum += end;
    }
    return sum + n_tokens;
}

layer_sums::layer_sums(const kvp_capture_plan & plan, int32_t layer)
    : plan(plan),
      il(layer),
      until(plan.first),
      open(size_t(plan.n_head_kv) * plan.n_tokens),
      row(plan.n_tokens),
      closed(plan.n_head_kv) {
    const size_t most = sums_per_head(plan.first, plan.block, plan.n_tokens);
    for (auto & head : closed) {
        head.reserve(most);
    }
}

void layer_sums::add(const char * attn, size_t n_kv, size_t n_query, size_t n_head, size_t stride_query,
                     size_t stride_head) {
    if (n_head % plan.n_head_kv != 0) {
        fail(KVP_ERR_UNSUPPORTED, "layer %d has %zu query heads, which its %u KV heads do not share evenly", il, n_head,
             plan.n_head_kv);
    }
    if (seen + n_query > plan.n_tokens || seen + n_query > n_kv) {
        fail(KVP_ERR_ARGUMENT, "layer %d read more than the %u tokens that were announced", il, plan.n_tokens);
    }
    const auto at = [&](size_t head, size_t query) {
        return reinterpret_cast<const float *>(attn + head * stride_head + query * stride_query);
    };
    // Cell i must hold token i. If it did not, the first query of a micro-batch would find its own token
    // in a later cell.
    const float * probe = at(0, 0);
    if (std::any_of(probe + seen + 1, probe + n_kv, [](float p) { return p > 0.0f; })) {
        fail(KVP_ERR_LAYOUT, "layer %d attends past token %zu: llama.cpp did not fill the cache's cells in order", il, seen);
    }
    const size_t group = n_head / plan.n_head_kv;
    for (size_t q = 0; q < n_query; ++q) {
        const size_t n = seen + 1; // tokens that this query sees, itself included
        for (size_t h = 0; h < plan.n_head_kv; ++h) {
            const float * largest = at(h * group, q);
            for (size_t g = 0; g < group; ++g) {
                const float * p = at(h * group + g, q);
                // a softmax with one bad number is bad throughout; a GPU may round above 1
                if (!(p[0] >= 0.0f && p[0] <= 1.001f)) {
                    fail(KVP_ERR_RUNTIME,
                         "the attention of layer %d at token %zu is no probability (%g): the model computes numbers that "
                         "are not finite",
                         il, seen, (double) p[0]);
                }
                if (g == 1) {
                    for (size_t i = 0; i < n; ++i) {
                        row[i] = largest[i] > p[i] ? largest[i] : p[i];
                    }
                    largest = row.data();
                } else if (g > 1) {
                    for (size_t i = 0; i < n; ++i) {
                        row[i] = row[i] > p[i] ? row[i] : p[i];
                    }
                }
            }
            float * sum = open.data() + h * plan.n_tokens;
            for (size_t i = 0; i < n; ++i) {
                sum[i] += largest[i];
            }
        }
        if (++seen == until) {
            close_block();
        }
    }
}

void layer_sums::close_block() {
    for (size_t h = 0; h < plan.n_head_kv; ++h) {
        float * sum = open.data() + h * plan.n_tokens;
        for (size_t i = 0; i < seen; ++i) {
            sum[i] *= plan.scale;
        }
        auto & out = closed[h];
        out.resize(out.size() + seen);
        ggml_fp32_to_fp16_row(sum, out.data() + out.size() - seen, (int64_t) seen);
        std::fill_n(sum, seen, 0.0f);
    }
    until = seen + plan.block;
}

void layer_sums::finish(uint16_t * out, size_t per_head) {
    if (seen + plan.block > until) { // queries since the last border
        close_block();
    }
    for (const auto & head : closed) {
        if (head.size() != per_head) {
            fail(KVP_ERR_ARGUMENT, "layer %d has %zu sums for a head, but there is room for %zu", il, head.size(), per_head);
        }
        std::memcpy(out, head.data(), per_head * sizeof(uint16_t));
        out += per_head;
    }
}

} // namespace kvp

using namespace kvp;

struct kvp_capture : kvp::subscriber {
    explicit kvp_capture(std::shared_ptr<observer> on) : subscriber(std::move(on)) {}

    bool begun() const { return plan.has_value(); }
    void begin(const kvp_capture_plan & what);
    void end(uint32_t n_tokens, uint16_t * sums, uint64_t n_sums);

protected:
    bool wants(const ggml_tensor * node) override;
    void see(const ggml_tensor * node) override;

private:
    std::optional<kvp_capture_plan> plan;   // set between begin and end
    std::vector<layer_sums>         layers; // in the order of the model
    std::vector<char>               copy;   // a node's data, where it lies on a device
};

namespace {

constexpr char NODE[] = "kq_soft_max-"; // named in llm_graph_context::build_attn_mha, src/llama-graph.cpp

// Cells of the cache whose keys a softmax node weighs: softmax <- ... <- mul_mat(view of the cache, q).
int64_t cells_behind(const ggml_tensor * node) {
    while (node && node->op != GGML_OP_MUL_MAT) {
        node = node->src[0];
    }
    const ggml_tensor * keys = node ? node->src[0] : nullptr;
    while (keys && keys->view_src) {
        keys = keys->view_src;
    }
    return keys ? keys->ne[1] : 0; // llama_kv_cache: [n_embd_k_gqa, n_cells, n_stream]
}

} // namespace

bool kvp_capture::wants(const ggml_tensor * node) {
    if (!plan || std::strncmp(node->name, NODE, sizeof(NODE) - 1) != 0) {
        return false;
    }
    return plan->base_cells == 0 || cells_behind(node) == plan->base_cells;
}

void kvp_capture::see(const ggml_tensor * node) {
    const int32_t il = std::atoi(node->name + sizeof(NODE) - 1);
    if (node->type != GGML_TYPE_F32 || node->ne[3] != 1 || node->nb[0] != sizeof(float)) {
        fail(KVP_ERR_UNSUPPORTED, "the attention of layer %d is not one f32 row for every query and head", il);
    }
    auto layer = std::find_if(layers.begin(), layers.end(), [&](const layer_sums & l) { return l.layer() == il; });
    if (layer == layers.end()) {
        if (layers.size() == plan->n_layer || (!layers.empty() && layers.back().layer() > il)) {
            fail(KVP_ERR_UNSUPPORTED, "layer %d attends to keys of another layer: its cache has %u layers in all", il,
                 plan->n_layer);
        }
        layers.emplace_back(*plan, il);
        layer = layers.end() - 1;
    }
    const char * data = static_cast<const char *>(node->data);
    const auto * home = node->view_src ? node->view_src->buffer : node->buffer;
    if (!ggml_backend_buffer_is_host(const_cast<ggml_backend_buffer *>(home))) {
        copy.resize(ggml_nbytes(node));
        ggml_backend_tensor_get(node, copy.data(), 0, copy.size());
        data = copy.data();
    }
    layer->add(data, (size_t) node->ne[0], (size_t) node->ne[1], (size_t) node->ne[2], node->nb[1], node->nb[2]);
}

void kvp_capture::begin(const kvp_capture_plan & what) {
    if (what.n_layer < 1 || what.n_layer > KVP_MAX_LAYERS || what.n_head_kv < 1 || what.n_tokens < 1) {
        fail(KVP_ERR_ARGUMENT, "a capture needs layers, KV heads and tokens, not %u, %u and %u", what.n_layer, what.n_head_kv,
             what.n_tokens);
    }
    if (what.block < 1 || what.first < 1 || what.first > what.block || !(what.scale > 0.0f)) {
        fail(KVP_ERR_ARGUMENT, "a block of %u queries cannot begin with one of %u, scaled by %g", what.block, what.first,
             (double) what.scale);
    }
    layers.clear();
    layers.reserve(what.n_layer);
    take_failure();
    plan = what;
}

void kvp_capture::end(uint32_t n_tokens, uint16_t * sums, uint64_t n_sums) {
    const kvp_capture_plan  what = *std::exchange(plan, std::nullopt);
    std::vector<layer_sums> seen = std::exchange(layers, {});
    if (const auto failure = take_failure()) {
        throw *failure;
    }
    if (seen.size() != what.n_layer) {
        fail(KVP_ERR_UNSUPPORTED,
             "llama.cpp showed the attention of %zu layers, but the cache has %u: the model computes it in another way (flash "
             "attention must be off)",
             seen.size(), what.n_layer);
    }
    const size_t per_head = sums_per_head(what.first, what.block, n_tokens);
    if (n_sums != per_head * what.n_head_kv * what.n_layer) {
        fail(KVP_ERR_ARGUMENT, "%u tokens make %zu sums, not %llu", n_tokens, per_head * what.n_head_kv * what.n_layer,
             (unsigned long long) n_sums);
    }
    for (auto & layer : seen) {
        if (layer.n_seen() != n_tokens) {
            fail(KVP_ERR_RUNTIME, "layer %d attended with %zu tokens, but %u were read", layer.layer(), layer.n_seen(), n_tokens);
        }
        layer.finish(sums, per_head);
        sums += per_head * what.n_head_kv;
    }
}

extern "C" {

int32_t kvp_capture_create(kvp_observer * observer, kvp_capture ** capture, kvp_error * err) {
    return guard(err, [&] {
        if (!observer || !capture) {
            fail(KVP_ERR_ARGUMENT, "kvp_capture_create: observer and capture must not be NULL");
        }
        *capture = new kvp_capture(observer->shared);
    });
}

void kvp_capture_free(kvp_capture * capture) { delete capture; }

int32_t kvp_capture_begin(kvp_capture * capture, const kvp_capture_plan * plan, kvp_error * err) {
    return guard(err, [&] {
        if (!capture || !plan) {
            fail(KVP_ERR_ARGUMENT, "kvp_capture_begin: capture and plan must not be NULL");
        }
        capture->begin(*plan);
    });
}

int32_t kvp_capture_end(kvp_capture * capture, uint32_t n_tokens, uint16_t * sums, uint64_t n_sums, kvp_error * err) {
    return guard(err, [&] {
        if (!capture || !capture->begun() || !sums) {
            fail(KVP_ERR_ARGUMENT, "kvp_capture_end: there is no capture to end, or no room for its sums");
        }
        capture->end(n_tokens, sums, n_sums);
    });
}

} // extern "C"
