// A learned policy's networks as a ggml graph: all heads of a layer, and many tokens, at once.
#pragma once

#include "graph/tensor_space.h"
#include "kvp_edge.h"
#include "owned.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml.h"

#include <cstdint>
#include <mutex>
#include <vector>

namespace kvp {

class device;

constexpr uint32_t N_POSITION = 4; // features made of a token's index in the conversation

// A place in the conversation: the token's row among those that are scored, or -1 for a token that is
// missing between its neighbours.
struct slot {
    int32_t index;
    float   position[N_POSITION];
};

// The n tokens with the slots missing between them, no more than the convolution can see (half).
std::vector<slot> with_gaps(const int32_t * tokens, uint32_t n, uint32_t half);

// Throws KVP_ERR_ARGUMENT unless tokens ascend from 0 or more.
void check_tokens(const int32_t * tokens, uint32_t n);

// What comes behind the first matrix, for the networks of one layer or of many: their number is the last
// dimension of each. conv [h, context, networks], fc2 [h, h, networks], fc2_bias [h, 1, networks] and
// out [h, heads of a network, networks].
struct upper_layers {
    ggml_tensor *conv, *fc2, *fc2_bias, *out;
};

// [heads of a network, n_out, networks] from u [h, n_out + context - 1, networks].
ggml_tensor * score_graph(ggml_context * ctx, ggml_tensor * u, const upper_layers & w, int64_t n_out);

class policy_network {
public:
    explicit policy_network(const kvp_policy_weights & weights);

    // Tells one network from all others, also from one that is gone.
    uint64_t id() const { return number; }

    // Where the vectors of layer il lie: that of row i and head h at data + i * token + h * head.
    struct rows {
        const float * data;
        size_t        token;
        size_t        head;
    };
    // Scores the n tokens of `slots`: scores f32 [n_head, n]. Threads take turns: a network may be shared by
    // several caches.
    void score(uint32_t il, rows keys, rows values, const slot * slots, size_t n_slots, uint32_t n, int32_t n_threads,
               float * scores);

    const kvp_policy_shape & shape() const { return sizes; }

    // Weights of one layer as kvp_policy_weights has them.
    const float * key(uint32_t il) const { return weights.key.data() + size_t(il) * units() * key_size(); }
    const float * value(uint32_t il) const { return weights.value.data() + size_t(il) * units() * value_size(); }
    const float * position(uint32_t il) const { return weights.position.data() + size_t(il) * units() * N_POSITION; }
    const float * fc1_bias(uint32_t il) const { return weights.fc1_bias.data() + size_t(il) * units(); }
    const float * conv(uint32_t il) const { return weights.conv.data() + size_t(il) * units() * sizes.context; }
    const float * fc2(uint32_t il) const { return weights.fc2.data() + size_t(il) * units() * sizes.hidden; }
    const float * fc2_bias(uint32_t il) const { return weights.fc2_bias.data() + size_t(il) * units(); }
    const float * out(uint32_t il) const { return weights.out.data() + size_t(il) * units() * heads_each(); }

    size_t units() const { return size_t(sizes.n_networks) * sizes.hidden; } // hidden units of a layer's networks
    size_t heads_each() const { return sizes.n_head_kv / sizes.n_networks; } // that a network scores
    // Numbers of a token's keys, and of its values, that a network sees: those of its heads, head by head.
    size_t key_size() const { return heads_each() * sizes.head_size_k; }
    size_t value_size() const { return heads_each() * sizes.head_size_v; }
    // Where the score of token i of n_out for a head lies in what score_graph gives.
    size_t place(size_t head, size_t i, size_t n_out) const { return (head / heads_each() * n_out + i) * heads_each() + head % heads_each(); }

private:
    struct layer {
        ggml_tensor * fc1;
        upper_layers  upper;
    };
    struct {
        std::vector<float> key, value, position, fc1_bias, conv, fc2, fc2_bias, out;
    } weights;

    template <typename Fill> void run(const layer & w, uint32_t n_in, uint32_t n_out, Fill fill, float * scores);

    uint64_t         number;
    kvp_policy_shape sizes;
    size_t           n_features; // that a network sees of a token: keys, values, position, 1; a multiple of 16
    std::mutex       running;    // held while the backend, its threads and the allocator are used
    // The backend outlives what lies in its buffers: members are destroyed from the last to the first.
    owned<ggml_backend, ggml_backend_free>               backend;
    tensor_space                                         space;
    owned<ggml_backend_buffer, ggml_backend_buffer_free> buffer;
    owned<ggml_gallocr, ggml_gallocr_free>               allocator;
    std::vector<layer>                                   layers;
};

constexpr uint32_t POSITION_ROW = 8; // N_POSITION features, 1, and zeros: no device minds a row of eight

// The weights of some layers in a device's memory, for keys and values as they are stored there: rotated
// by the cache's Hadamard matrix like these, so that nothing needs to be rotated back.
struct device_policy : upper_layers {
    device_policy(const policy_network & network, device & on, const std::vector<uint32_t> & layers, uint32_t k_hadamard_block,
                  uint32_t v_hadamard_block);

    // Of a matrix for all networks of all layers, those of the l-th layer.
    ggml_tensor * of_layer(ggml_context * ctx, ggml_tensor * all, size_t l) const;

    uint64_t     network; // whose weights these are
    ggml_tensor *key, *value, *position; // [key_size, h, networks], [value_size, h, networks], [POSITION_ROW, h * networks]

private:
    size_t                                               n_networks; // of a layer
    tensor_space                                         space;
    owned<ggml_backend_buffer, ggml_backend_buffer_free> buffer;
};

} // namespace kvp

struct kvp_policy {
    kvp::policy_network network;
};
