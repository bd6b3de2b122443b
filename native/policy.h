// A learned policy's network as a ggml graph: all heads of a layer, and many tokens, at once.
#pragma once

#include "kvp_edge.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml.h"

#include <memory>
#include <vector>

namespace kvp {

template <auto release> struct with {
    template <typename T> void operator()(T * object) const { release(object); }
};
template <typename T, auto release> using owned = std::unique_ptr<T, with<release>>;

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

class policy_network {
public:
    explicit policy_network(const kvp_policy_weights & weights);

    // Where the vectors of layer il lie: that of row i and head h at data + i * token + h * head.
    struct rows {
        const float * data;
        size_t        token;
        size_t        head;
    };
    // Scores the n tokens of `slots`: scores f32 [n_head, n].
    void score(uint32_t il, rows keys, rows values, const slot * slots, size_t n_slots, uint32_t n, int32_t n_threads,
               float * scores);

    const kvp_policy_shape & shape() const { return sizes; }

private:
    struct layer {
        ggml_tensor *fc1, *conv, *fc2, *fc2_bias, *out;
    };

    void put(ggml_tensor * tensor, const std::vector<float> & values);
    template <typename Fill> void run(const layer & w, uint32_t n_in, uint32_t n_out, Fill fill, float * scores);

    kvp_policy_shape sizes;
    uint32_t         n_features; // of a token: key, value, position, 1; a multiple of 16
    // The backend outlives what lies in its buffers: members are destroyed from the last to the first.
    owned<ggml_backend, ggml_backend_free>               backend;
    owned<ggml_context, ggml_free>                       context;
    owned<ggml_backend_buffer, ggml_backend_buffer_free> buffer;
    owned<ggml_gallocr, ggml_gallocr_free>               allocator;
    std::vector<layer>                                   layers;
};

} // namespace kvp

struct kvp_policy {
    kvp::policy_network network;
};
