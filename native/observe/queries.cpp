// kvp_queries: sees every node of a running graph and keeps what attention reads as queries.
#include "observe/queries.h"

#include "error.h"
#include "state/rows.h"
#include "observe/cache_nodes.h"
#include "observe/observer.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <optional>

namespace kvp {

query_ring::query_ring(uint32_t n_layer, uint32_t n_head, uint32_t head_size, uint32_t capacity)
    : n_layer(n_layer),
      row(size_t(n_head) * head_size),
      n_head(n_head),
      head_size(head_size),
      capacity(capacity),
      n_new(n_layer),
      fresh(n_layer),
      index(capacity),
      data(n_layer * capacity * row) {}

float * query_ring::next(uint32_t layer) {
    const size_t at = n_new[layer]++ % capacity * row;
    if (fresh[layer].size() < at + row) {
        fresh[layer].resize(at + row);
    }
    return fresh[layer].data() + at;
}

bool query_ring::has_new(uint32_t n) const {
    return std::all_of(n_new.begin(), n_new.end(), [&](uint64_t of_layer) { return of_layer == n; });
}

void query_ring::commit(int32_t first, uint32_t n) {
    for (uint32_t i = n - std::min(n, capacity); i < n; ++i) {
        const size_t slot = (committed + i) % capacity;
        index[slot]       = first + int32_t(i);
        for (uint32_t l = 0; l < n_layer; ++l) {
            std::copy_n(fresh[l].begin() + i % capacity * row, row, data.begin() + (l * capacity + slot) * row);
        }
    }
    committed += n;
    oldest = std::max(oldest, committed - std::min(committed, uint64_t(capacity)));
    std::fill(n_new.begin(), n_new.end(), 0);
}

void query_ring::rewind(int32_t length) {
    while (committed > oldest && index[(committed - 1) % capacity] >= length) {
        --committed;
    }
    drop_new();
}

void query_ring::drop_new() { std::fill(n_new.begin(), n_new.end(), 0); }

void query_ring::read(uint32_t n, float * queries, int32_t * indices) const {
    const uint64_t begin = committed - n;
    for (uint32_t i = 0; i < n; ++i) {
        indices[i] = index[(begin + i) % capacity];
    }
    for (uint32_t l = 0; l < n_layer; ++l) {
        const float * layer = data.data() + size_t(l) * capacity * row;
        for (uint32_t i = 0; i < n; ++i) {
            const float * token = layer + (begin + i) % capacity * row;
            for (uint32_t h = 0; h < n_head; ++h) {
                float * out = queries + ((size_t(l) * n_head + h) * n + i) * head_size;
                std::memcpy(out, token + size_t(h) * head_size, head_size * sizeof(float));
            }
        }
    }
}

} // namespace kvp

using namespace kvp;

namespace {

// The tensor that a view is of, also if it was copied: flash attention casts f32 keys to f16.
const ggml_tensor * source_of(const ggml_tensor * t) {
    t = root_of(t);
    while (t && t->op == GGML_OP_CPY) {
        t = root_of(t->src[0]);
    }
    return t;
}

// The layer whose cached keys a tensor holds, or -1.
int32_t layer_of_keys(const ggml_tensor * t) { return layer_named(source_of(t), KEYS); }

float float_param(const ggml_tensor * node, int i) {
    float value;
    std::memcpy(&value, reinterpret_cast<const char *>(node->op_params) + size_t(i) * sizeof(float), sizeof(value));
    return value;
}

// Where attention multiplies keys and queries: a flash attention, or the first product of the long way.
struct product {
    const ggml_tensor * q = nullptr; // [head_size, n_query, n_head], permuted
    const ggml_tensor * k = nullptr;
};

std::optional<product> product_at(const ggml_tensor * node) {
    if (node->op == GGML_OP_FLASH_ATTN_EXT && layer_of_keys(node->src[1]) >= 0) {
        return product{ node->src[0], node->src[1] };
    }
    if (node->op == GGML_OP_MUL_MAT && layer_of_keys(node->src[0]) >= 0) {
        return product{ node->src[1], node->src[0] };
    }
    return std::nullopt;
}

// What weighs the products, and whether it is softmax(scale * q.k) and nothing else.
struct weighing {
    float scale = 0.0f;
    bool  plain = false;
};

std::optional<std::pair<int32_t, weighing>> weighing_at(const ggml_tensor * node) {
    if (node->op == GGML_OP_FLASH_ATTN_EXT && layer_of_keys(node->src[1]) >= 0) {
        const bool plain = float_param(node, 1) == 0.0f && float_param(node, 2) == 0.0f && !node->src[4];
        return std::make_pair(layer_of_keys(node->src[1]), weighing{ float_param(node, 0), plain });
    }
    if (node->op == GGML_OP_SOFT_MAX && node->src[0] && product_at(node->src[0])) {
        const bool plain = float_param(node, 1) == 0.0f && !node->src[2];
        return std::make_pair(layer_of_keys(node->src[0]->src[0]), weighing{ float_param(node, 0), plain });
    }
    return std::nullopt;
}

// A tensor's bytes from its first value on, copied to the host if they lie elsewhere.
const char * bytes_of(const ggml_tensor * t, std::vector<char> & copy) {
    const auto * home = root_of(t)->buffer;
    if (ggml_backend_buffer_is_host(const_cast<ggml_backend_buffer *>(home))) {
        return static_cast<const char *>(t->data);
    }
    copy.resize(ggml_nbytes(t));
    ggml_backend_tensor_get(t, copy.data(), 0, copy.size());
    return copy.data();
}

// What the tokens of the trial showed of one layer's attention.
struct seen_layer {
    int64_t            n_head    = 0;
    int64_t            head_size = 0;
    uint32_t           products  = 0;     // nodes that multiply with its keys, in one graph
    bool               f32       = false; // the queries are
    weighing           weigh;
    std::vector<float> keys;              // the first rows of the cache, as stored: [n, n_embd_k]
};

} // namespace

struct kvp_queries : kvp::subscriber {
    explicit kvp_queries(std::shared_ptr<observer> on) : subscriber(std::move(on)) {}

    // Looks at the products of the next n tokens, those of an empty cache.
    void try_with(uint32_t n);
    // Ends the trial and logs from now on: see kvp_queries_start.
    void start(const kvp_cache_shape & cache, const float * keys, uint32_t capacity, float * scales);
    void append(int32_t first, uint32_t n);
    void rewind(int32_t length);
    void watch(bool on);
    uint32_t size() const { return ring ? ring->size() : 0; }
    void     read(uint32_t n, float * queries, int32_t * indices) const;

    bool                      on_trial() const { return now == state::trial; }
    bool                      started() const { return ring.has_value(); }
    const kvp_queries_shape & logged_shape() const { return shape; }

protected:
    bool wants(const ggml_tensor * node) override;
    void see(const ggml_tensor * node) override;

private:
    enum class state { off, trial, on } now = state::off; // off again while it looks away

    uint32_t                      trial_tokens = 0;
    std::map<int32_t, seen_layer> layers;   // by number in the model; filled by the trial
    std::map<int32_t, uint32_t>   row_of;   // layer in the model -> layer of the base cache
    kvp_queries_shape             shape{};
    std::optional<query_ring>     ring;
    std::vector<char>             copy;     // of queries that lie on a device

    void try_out(const product & p, seen_layer & layer);
    void take(const product & p, uint32_t layer);
};

namespace {

template <typename Log> Log & running(Log * log, const char * who) {
    if (!log || !log->started()) {
        fail(KVP_ERR_ARGUMENT, "%s: the log of queries was not started", who);
    }
    return *log;
}

} // namespace

bool kvp_queries::wants(const ggml_tensor * node) {
    if (now == state::off) {
        return false;
    }
    if (now == state::trial) {
        if (const auto found = weighing_at(node)) {
            layers[found->first].weigh = found->second;
        }
        return product_at(node).has_value();
    }
    const auto p = product_at(node);
    return p && row_of.count(layer_of_keys(p->k)) > 0;
}

void kvp_queries::see(const ggml_tensor * node) {
    const auto p = product_at(node);
    if (!p) {
        return;
    }
    const int32_t il = layer_of_keys(p->k);
    if (now == state::trial) {
        try_out(*p, layers[il]);
    } else if (const auto row = row_of.find(il); row != row_of.end()) {
        take(*p, row->second);
    }
}

void kvp_queries::try_out(const product & p, seen_layer & layer) {
    layer.products += 1;
    layer.n_head    = p.q->ne[2];
    layer.head_size = p.q->ne[0];
    layer.f32       = p.q->type == GGML_TYPE_F32 && p.q->nb[0] == sizeof(float) && p.q->ne[3] == 1;
    // tokens of an empty cache lie in its first cells
    const ggml_tensor * cells = source_of(p.k);
    const auto          n     = int64_t(trial_tokens);
    if (cells->ne[1] < n) {
        return;
    }
    std::vector<char> rows(size_t(n) * cells->nb[1]);
    ggml_backend_tensor_get(cells, rows.data(), 0, rows.size());
    layer.keys.resize(size_t(n * cells->ne[0]));
    const auto to_float = ggml_get_type_traits(cells->type)->to_float;
    for (int64_t i = 0; i < n; ++i) {
        const char * row = rows.data() + size_t(i) * cells->nb[1];
        float *      out = layer.keys.data() + i * cells->ne[0];
        if (cells->type == GGML_TYPE_F32) {
            std::memcpy(out, row, size_t(cells->ne[0]) * sizeof(float));
        } else if (to_float) {
            to_float(row, out, cells->ne[0]);
        }
    }
}

void kvp_queries::take(const product & p, uint32_t layer) {
    if (p.q->ne[2] != shape.n_head || p.q->ne[0] != shape.head_size || p.q->ne[3] != 1) {
        fail(KVP_ERR_RUNTIME, "the queries of layer %u have changed their shape", layer);
    }
    const char * data = bytes_of(p.q, copy);
    for (int64_t t = 0; t < p.q->ne[1]; ++t) {
        float * out = ring->next(layer);
        for (uint32_t h = 0; h < shape.n_head; ++h) {
            std::memcpy(out + size_t(h) * shape.head_size, data + size_t(t) * p.q->nb[1] + h * p.q->nb[2],
                        shape.head_size * sizeof(float));
        }
    }
}

void kvp_queries::try_with(uint32_t n) {
    layers.clear();
    row_of.clear();
    ring.reset();
    take_failure();
    trial_tokens = n;
    now          = state::trial;
}

void kvp_queries::start(const kvp_cache_shape & cache, const float * keys, uint32_t capacity, float * scales) {
    now = state::off;
    if (const auto failure = take_failure()) {
        throw *failure;
    }
    const size_t head = cache.head_size_k, row = head * cache.n_head_kv, n = trial_tokens;
    // The base cache's layer l is the layer of the model, behind that of l - 1, that holds its keys.
    auto at = layers.begin();
    for (uint32_t l = 0; l < cache.n_layer; ++l, ++at) {
        const auto same = [&](std::vector<float> stored) {
            if (stored.size() != n * row) {
                return false;
            }
            if (cache.k_hadamard_block) {
                hadamard(stored.data(), stored.size(), cache.k_hadamard_block);
            }
            for (size_t h = 0; h < cache.n_head_kv; ++h) {
                for (size_t i = 0; i < n; ++i) {
                    const float * want = keys + ((l * cache.n_head_kv + h) * n + i) * head;
                    if (!std::equal(want, want + head, stored.data() + i * row + h * head)) {
                        return false;
                    }
                }
            }
            return true;
        };
        at = std::find_if(at, layers.end(), [&](const auto & layer) { return same(layer.second.keys); });
        if (at == layers.end()) {
            fail(KVP_ERR_UNSUPPORTED,
                 "this model's queries cannot be logged: llama.cpp shows no attention with the keys of layer %u of its "
                 "cache",
                 l);
        }
        const seen_layer & seen = at->second;
        if (!seen.f32 || seen.head_size != cache.head_size_k || seen.products != 1 || seen.n_head < 1 ||
            seen.n_head % cache.n_head_kv != 0) {
            fail(KVP_ERR_UNSUPPORTED,
                 "this model's queries cannot be logged: those of layer %d (%lld heads of %lld) are not one f32 row for "
                 "every token and head",
                 at->first, (long long) seen.n_head, (long long) seen.head_size);
        }
        if (!seen.weigh.plain) {
            fail(KVP_ERR_UNSUPPORTED,
                 "this model's queries are of no use: the attention of layer %d is more than softmax(scale * q.k)", at->first);
        }
        if (l > 0 && seen.n_head != shape.n_head) {
            fail(KVP_ERR_UNSUPPORTED, "this model's queries cannot be logged: its layers have %u and %lld query heads",
                 shape.n_head, (long long) seen.n_head);
        }
        shape             = { cache.n_layer, uint32_t(seen.n_head), uint32_t(seen.head_size), cache.k_hadamard_block };
        row_of[at->first] = l;
        scales[l]         = seen.weigh.scale;
    }
    layers.clear();
    ring.emplace(shape.n_layer, shape.n_head, shape.head_size, capacity);
    now = state::on;
}

void kvp_queries::append(int32_t first, uint32_t n) {
    if (const auto failure = take_failure()) {
        ring->rewind(first);
        throw *failure;
    }
    if (!ring->has_new(n)) {
        ring->rewind(first);
        fail(KVP_ERR_RUNTIME, "llama.cpp did not show the queries of the %u tokens from %d on in every layer", n, first);
    }
    ring->commit(first, n);
}

void kvp_queries::rewind(int32_t length) {
    take_failure();
    ring->rewind(length);
}

void kvp_queries::watch(bool on) {
    take_failure();
    ring->drop_new();
    now = on ? state::on : state::off;
}

void kvp_queries::read(uint32_t n, float * queries, int32_t * indices) const {
    ring->read(n, queries, indices);
    if (shape.k_hadamard_block) {
        hadamard(queries, size_t(shape.n_layer) * shape.n_head * n * shape.head_size, shape.k_hadamard_block);
    }
}

extern "C" {

int32_t kvp_queries_create(kvp_observer * observer, kvp_queries ** log, kvp_error * err) {
    return guard(err, [&] {
        if (!observer || !log) {
            fail(KVP_ERR_ARGUMENT, "kvp_queries_create: observer and log must not be NULL");
        }
        *log = new kvp_queries(observer->shared);
    });
}

void kvp_queries_free(kvp_queries * log) { delete log; }

int32_t kvp_queries_try(kvp_queries * log, uint32_t n_tokens, kvp_error * err) {
    return guard(err, [&] {
        if (!log || n_tokens < 1) {
            fail(KVP_ERR_ARGUMENT, "kvp_queries_try: there is no log, or no token to try");
        }
        log->try_with(n_tokens);
    });
}

int32_t kvp_queries_start(kvp_queries * log, const kvp_cache_shape * cache, const float * keys, uint32_t capacity,
                          kvp_queries_shape * shape, float * scales, kvp_error * err) {
    return guard(err, [&] {
        if (!log || !log->on_trial() || !cache || !keys || !shape || !scales || capacity < 1) {
            fail(KVP_ERR_ARGUMENT, "kvp_queries_start: there was no trial, or something is missing");
        }
        log->start(*cache, keys, capacity, scales);
        *shape = log->logged_shape();
    });
}

int32_t kvp_queries_append(kvp_queries * log, int32_t first, uint32_t n, kvp_error * err) {
    return guard(err, [&] { running(log, "kvp_queries_append").append(first, n); });
}

int32_t kvp_queries_rewind(kvp_queries * log, int32_t length, kvp_error * err) {
    return guard(err, [&] { running(log, "kvp_queries_rewind").rewind(length); });
}

int32_t kvp_queries_watch(kvp_queries * log, int32_t on, kvp_error * err) {
    return guard(err, [&] { running(log, "kvp_queries_watch").watch(on != 0); });
}

uint32_t kvp_queries_size(const kvp_queries * log) { return log ? log->size() : 0; }

int32_t kvp_queries_read(const kvp_queries * log, uint32_t n, float * queries, int32_t * indices, kvp_error * err) {
    return guard(err, [&] {
        running(log, "kvp_queries_read");
        if (n > log->size() || (n > 0 && (!queries || !indices))) {
            fail(KVP_ERR_ARGUMENT, "the log has the queries of %u tokens, not %u, or there is no room", log->size(), n);
        }
        log->read(n, queries, indices);
    });
}

} // extern "C"
