#include "graph/policy.h"

#include "error.h"
#include "state/rows.h"
#include "graph/device.h"

#include <algorithm>
#include <atomic>
#include <cmath>

namespace kvp {

namespace {

constexpr uint32_t CHUNK        = 512; // tokens per graph: what a layer needs for them stays in the processor's cache
constexpr uint32_t MOST_CONTEXT = 33;
constexpr size_t   GRAPH_NODES  = 16 + 4 * MOST_CONTEXT; // a tap takes two views, a product and a sum (ggml aborts on one too many)

// docs/policy-format.md, "The score", 1: log2(1+p)/16, sin(log2(1+p)), cos(log2(1+p)), 1/(1+p).
void position_features(int32_t p, float * out) {
    const float from_one = 1.0f + (float) p;
    const float log      = std::log2(from_one);
    out[0]               = log / 16.0f;
    out[1]               = std::sin(log);
    out[2]               = std::cos(log);
    out[3]               = 1.0f / from_one;
}

upper_layers new_upper(ggml_context * ctx, const policy_network & net, int64_t networks) {
    const int64_t h = net.shape().hidden, heads_each = int64_t(net.heads_each());
    return { ggml_new_tensor_3d(ctx, GGML_TYPE_F32, h, net.shape().context, networks), ggml_new_tensor_3d(ctx, GGML_TYPE_F32, h, h, networks),
             ggml_new_tensor_3d(ctx, GGML_TYPE_F32, h, 1, networks), ggml_new_tensor_3d(ctx, GGML_TYPE_F32, h, heads_each, networks) };
}

void set_threads(ggml_backend_t backend, int32_t n_threads) {
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend));
    // not every device has threads to set
    if (auto set = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads")) {
        set(backend, n_threads);
    }
}

} // namespace

std::vector<slot> with_gaps(const int32_t * tokens, uint32_t n, uint32_t half) {
    std::vector<slot> slots;
    slots.reserve(n);
    for (uint32_t i = 0; i < n; ++i) {
        if (i > 0) {
            const int64_t missing = int64_t(tokens[i]) - tokens[i - 1] - 1;
            slots.insert(slots.end(), (size_t) std::min<int64_t>(missing, half), slot{ -1, {} });
        }
        slot found{ (int32_t) i, {} };
        position_features(tokens[i], found.position);
        slots.push_back(found);
    }
    return slots;
}

void check_tokens(const int32_t * tokens, uint32_t n) {
    for (uint32_t i = 0; i < n; ++i) {
        if (tokens[i] < 0 || (i > 0 && tokens[i] <= tokens[i - 1])) {
            fail(KVP_ERR_ARGUMENT, "tokens must ascend from 0 or more, but entry %u is %d", i, tokens[i]);
        }
    }
}

policy_network::policy_network(const kvp_policy_weights & w) : sizes(w.shape) {
    static std::atomic<uint64_t> created{ 0 };
    number         = ++created;
    const auto & s = sizes;
    if (s.n_layer == 0 || s.n_layer > KVP_MAX_LAYERS || s.n_head_kv == 0 || s.head_size_k == 0 || s.head_size_v == 0 ||
        s.hidden == 0 || s.context % 2 == 0 || s.context > MOST_CONTEXT) {
        fail(KVP_ERR_ARGUMENT, "a policy of %u layers x %u heads x %u+%u with %u hidden units and a context of %u is not possible",
             s.n_layer, s.n_head_kv, s.head_size_k, s.head_size_v, s.hidden, s.context);
    }
    if (s.n_networks != s.n_head_kv && s.n_networks != 1) {
        fail(KVP_ERR_ARGUMENT, "a layer of %u KV heads has a network for each of them, or one for all, but not %u", s.n_head_kv, s.n_networks);
    }
    if (!w.key || !w.value || !w.position || !w.fc1_bias || !w.conv || !w.fc2 || !w.fc2_bias || !w.out) {
        fail(KVP_ERR_ARGUMENT, "a policy needs all of its weights");
    }
    const size_t h = s.hidden, dk = key_size(), dv = value_size();
    n_features = (dk + dv + N_POSITION + 1 + 15) / 16 * 16;

    const size_t all = size_t(s.n_layer) * units();
    weights          = { { w.key, w.key + all * dk },
                         { w.value, w.value + all * dv },
                         { w.position, w.position + all * N_POSITION },
                         { w.fc1_bias, w.fc1_bias + all },
                         { w.conv, w.conv + all * s.context },
                         { w.fc2, w.fc2 + all * h },
                         { w.fc2_bias, w.fc2_bias + all },
                         { w.out, w.out + all * heads_each() } };

    backend.reset(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
    if (!backend) {
        fail(KVP_ERR_RUNTIME, "ggml has no CPU device to run a policy on");
    }
    space = tensor_space(5 * s.n_layer);
    for (uint32_t il = 0; il < s.n_layer; ++il) {
        layers.push_back({ ggml_new_tensor_3d(space.get(), GGML_TYPE_F32, int64_t(n_features), int64_t(h), s.n_networks),
                           new_upper(space.get(), *this, s.n_networks) });
    }
    buffer.reset(ggml_backend_alloc_ctx_tensors(space.get(), backend.get()));
    allocator.reset(ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend.get())));
    if (!buffer || !allocator) {
        fail(KVP_ERR_MEMORY, "there is not enough memory for the policy's weights");
    }
    for (uint32_t il = 0; il < s.n_layer; ++il) {
        // One matrix for everything a token's first layer sees; the last feature is 1, times the bias.
        std::vector<float> fc1(n_features * units(), 0.0f);
        for (size_t unit = 0; unit < units(); ++unit) {
            float * to = fc1.data() + unit * n_features;
            to         = std::copy_n(key(il) + unit * dk, dk, to);
            to         = std::copy_n(value(il) + unit * dv, dv, to);
            to         = std::copy_n(position(il) + unit * N_POSITION, N_POSITION, to);
            *to        = fc1_bias(il)[unit];
        }
        const auto put = [](ggml_tensor * tensor, const float * values) {
            ggml_backend_tensor_set(tensor, values, 0, ggml_nbytes(tensor));
        };
        put(layers[il].fc1, fc1.data());
        put(layers[il].upper.conv, conv(il));
        put(layers[il].upper.fc2, fc2(il));
        put(layers[il].upper.fc2_bias, fc2_bias(il));
        put(layers[il].upper.out, out(il));
    }
}

ggml_tensor * score_graph(ggml_context * ctx, ggml_tensor * u, const upper_layers & w, int64_t n_out) {
    const int64_t h = u->ne[0], networks = u->ne[2];
    ggml_tensor * x = nullptr;
    for (int64_t tap = 0; tap < w.conv->ne[1]; ++tap) {
        ggml_tensor * shifted = ggml_view_3d(ctx, u, h, n_out, networks, u->nb[1], u->nb[2], size_t(tap) * u->nb[1]);
        ggml_tensor * weight  = ggml_view_3d(ctx, w.conv, h, 1, networks, w.conv->nb[1], w.conv->nb[2], size_t(tap) * w.conv->nb[1]);
        ggml_tensor * term    = ggml_mul(ctx, shifted, weight);
        x                     = x ? ggml_add_inplace(ctx, x, term) : term;
    }
    x = ggml_silu_inplace(ctx, x);
    x = ggml_add_inplace(ctx, mul_mat_f32(ctx, w.fc2, x), w.fc2_bias);
    return mul_mat_f32(ctx, w.out, ggml_silu_inplace(ctx, x));
}

// Scores n_out tokens from n_in = n_out + context - 1: fill(input) writes the features, f32
// [networks, n_in, n_features]; scores [networks, n_out, heads of a network].
template <typename Fill>
void policy_network::run(const layer & w, uint32_t n_in, uint32_t n_out, Fill fill, float * scores) {
    const tensor_space nodes(GRAPH_NODES, GRAPH_NODES);
    ggml_context *     ctx   = nodes.get();
    ggml_tensor *      input = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, int64_t(n_features), n_in, sizes.n_networks);
    ggml_set_input(input);

    // A missing token's features are all 0, its 1 included, so that its u is 0.
    ggml_tensor * u     = ggml_mul_mat(ctx, w.fc1, input); // [h, n_in, networks]
    ggml_tensor * score = score_graph(ctx, u, w.upper, n_out);
    ggml_set_output(score);

    ggml_cgraph * graph = ggml_new_graph_custom(ctx, GRAPH_NODES, false);
    ggml_build_forward_expand(graph, score);
    if (!ggml_gallocr_alloc_graph(allocator.get(), graph)) {
        throw std::bad_alloc();
    }
    fill(static_cast<float *>(input->data)); // the CPU's buffers are host memory
    const ggml_status status = ggml_backend_graph_compute(backend.get(), graph);
    if (status != GGML_STATUS_SUCCESS) {
        fail(KVP_ERR_RUNTIME, "ggml could not score %u tokens: %s", n_out, ggml_status_to_string(status));
    }
    ggml_backend_tensor_get(score, scores, 0, size_t(n_out) * sizes.n_head_kv * sizeof(float));
}

void policy_network::score(uint32_t il, rows keys, rows values, const slot * slots, size_t n_slots, uint32_t n,
                           int32_t n_threads, float * scores) {
    const size_t       dk = sizes.head_size_k, dv = sizes.head_size_v, each = heads_each(), half = sizes.context / 2;
    std::vector<float> found(size_t(sizes.n_head_kv) * CHUNK);
    const std::lock_guard<std::mutex> lock(running);
    set_threads(backend.get(), n_threads);
    for (size_t first = 0; first < n_slots; first += CHUNK) {
        const size_t n_out = std::min<size_t>(CHUNK, n_slots - first);
        const size_t n_in  = n_out + 2 * half;
        const auto   fill  = [&](float * input) {
            for (size_t network = 0; network < sizes.n_networks; ++network) {
                for (size_t at = 0; at < n_in; ++at) {
                    float *      row   = input + (network * n_in + at) * n_features;
                    const size_t here  = first + at; // counted with the empty slots before the first token
                    const slot * token = here >= half && here - half < n_slots ? slots + (here - half) : nullptr;
                    if (!token || token->index < 0) {
                        std::fill_n(row, n_features, 0.0f);
                        continue;
                    }
                    float *    to      = row;
                    const auto heads_of = [&](const rows & from, size_t size) {
                        for (size_t head = network * each; head < (network + 1) * each; ++head) {
                            to = std::copy_n(from.data + size_t(token->index) * from.token + head * from.head, size, to);
                        }
                    };
                    heads_of(keys, dk);
                    heads_of(values, dv);
                    to    = std::copy_n(token->position, N_POSITION, to);
                    *to++ = 1.0f;
                    std::fill(to, row + n_features, 0.0f);
                }
            }
        };
        run(layers[il], (uint32_t) n_in, (uint32_t) n_out, fill, found.data());
        for (size_t i = 0; i < n_out; ++i) {
            for (size_t head = 0; slots[first + i].index >= 0 && head < sizes.n_head_kv; ++head) {
                scores[head * n + slots[first + i].index] = found[place(head, i, n_out)];
            }
        }
    }
}

device_policy::device_policy(const policy_network & net, device & on, const std::vector<uint32_t> & of, uint32_t k_hadamard_block,
                             uint32_t v_hadamard_block)
    : network(net.id()), n_networks(net.shape().n_networks), space(7) {
    const kvp_policy_shape & s        = net.shape();
    const int64_t            networks = int64_t(of.size() * n_networks), h = s.hidden;
    key                               = ggml_new_tensor_3d(space.get(), GGML_TYPE_F32, int64_t(net.key_size()), h, networks);
    value                             = ggml_new_tensor_3d(space.get(), GGML_TYPE_F32, int64_t(net.value_size()), h, networks);
    position                          = ggml_new_tensor_2d(space.get(), GGML_TYPE_F32, POSITION_ROW, h * networks);
    upper_layers::operator=(new_upper(space.get(), net, networks));
    buffer = on.allocate(space.get());

    // w . (H y) = (H w) . y, as H is symmetric; its block divides a head, so that heads side by side are rotated alike
    const auto put = [&](ggml_tensor * tensor, auto part, uint32_t hadamard_block) {
        std::vector<float> all;
        all.reserve(size_t(ggml_nelements(tensor)));
        for (const uint32_t il : of) {
            part(il, all);
        }
        if (hadamard_block) {
            hadamard(all.data(), all.size(), hadamard_block);
        }
        on.set(tensor, all.data(), all.size() * sizeof(float));
    };
    const auto copy = [&](const float * (policy_network::*weights)(uint32_t) const, size_t per_unit) {
        return [=, &net](uint32_t il, std::vector<float> & all) {
            const float * from = (net.*weights)(il);
            all.insert(all.end(), from, from + net.units() * per_unit);
        };
    };
    put(key, copy(&policy_network::key, net.key_size()), k_hadamard_block);
    put(value, copy(&policy_network::value, net.value_size()), v_hadamard_block);
    put(conv, copy(&policy_network::conv, s.context), 0);
    put(fc2, copy(&policy_network::fc2, s.hidden), 0);
    put(fc2_bias, copy(&policy_network::fc2_bias, 1), 0);
    put(out, copy(&policy_network::out, net.heads_each()), 0);
    put(position, [&](uint32_t il, std::vector<float> & all) {
        for (size_t unit = 0; unit < net.units(); ++unit) {
            const float * from = net.position(il) + unit * N_POSITION;
            all.insert(all.end(), from, from + N_POSITION);
            all.push_back(net.fc1_bias(il)[unit]);
            all.resize(all.size() + POSITION_ROW - N_POSITION - 1);
        }
    }, 0);
}

ggml_tensor * device_policy::of_layer(ggml_context * ctx, ggml_tensor * all, size_t l) const {
    return ggml_view_3d(ctx, all, all->ne[0], all->ne[1], int64_t(n_networks), all->nb[1], all->nb[2], l * n_networks * all->nb[2]);
}

} // namespace kvp

using kvp::fail;

extern "C" {

int32_t kvp_policy_create(const kvp_policy_weights * weights, kvp_policy ** policy, kvp_error * err) {
    return kvp::guard(err, [&] {
        if (!weights || !policy) {
            fail(KVP_ERR_ARGUMENT, "kvp_policy_create: weights and policy must not be NULL");
        }
        *policy = new kvp_policy{ kvp::policy_network(*weights) };
    });
}

void kvp_policy_free(kvp_policy * policy) { delete policy; }

int32_t kvp_policy_score(kvp_policy * policy, const float * keys, const float * values, const int32_t * tokens, uint32_t n,
                         int32_t n_threads, float * scores, kvp_error * err) {
    return kvp::guard(err, [&] {
        if (!policy || (n > 0 && (!keys || !values || !tokens || !scores))) {
            fail(KVP_ERR_ARGUMENT, "kvp_policy_score: policy, keys, values, tokens and scores must not be NULL");
        }
        kvp::check_tokens(tokens, n);
        const kvp_policy_shape & s     = policy->network.shape();
        const auto               slots = kvp::with_gaps(tokens, n, s.context / 2);
        const size_t             H = s.n_head_kv, dk = s.head_size_k, dv = s.head_size_v;
        for (uint32_t il = 0; n > 0 && il < s.n_layer; ++il) {
            policy->network.score(il, { keys + il * H * n * dk, dk, n * dk }, { values + il * H * n * dv, dv, n * dv }, slots.data(),
                                  slots.size(), n, n_threads, scores + il * H * n);
        }
    });
}

} // extern "C"
