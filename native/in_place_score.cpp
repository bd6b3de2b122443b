// Scores of tokens whose keys and values stay on their device: cells go there, scores come back.
#include "in_place.h"

#include "error.h"
#include "rows.h"
#include "scorers.h"

#include <algorithm>

namespace kvp {

namespace {

// f32 [head_size, n, n_head_kv] of the n rows in `cells`, as they are stored: still in the Hadamard rotation.
ggml_tensor * gather(ggml_context * ctx, ggml_tensor * table, ggml_tensor * cells, int64_t head_size, int64_t n_head_kv) {
    ggml_tensor * rows = ggml_get_rows(ctx, table, cells); // [n_head_kv * head_size, n]
    rows               = ggml_reshape_3d(ctx, rows, head_size, n_head_kv, cells->ne[0]);
    return ggml_cont(ctx, ggml_permute(ctx, rows, 0, 2, 1, 3));
}

// [n_column, cells before `end`] of values that are stored column by column.
ggml_tensor * as_rows(ggml_context * ctx, ggml_tensor * v, int64_t end) {
    ggml_tensor * columns = ggml_view_2d(ctx, v, end, v->ne[0], size_t(v->ne[1]) * v->nb[0], 0);
    return ggml_cont(ctx, ggml_transpose(ctx, columns));
}

constexpr float TINY = 1e-12f; // as in scorers.cpp

// [n, n_head_kv] from keys [head_size, n, n_head_kv]. Neither norms nor angles change under the rotation.
ggml_tensor * knorm(ggml_context * ctx, ggml_tensor * keys) {
    ggml_tensor * norm = ggml_sqrt(ctx, ggml_sum_rows(ctx, ggml_sqr(ctx, keys)));
    return ggml_scale(ctx, norm, -1.0f);
}

ggml_tensor * keydiff(ggml_context * ctx, ggml_tensor * keys) {
    ggml_tensor * direction = ggml_l2_norm(ctx, keys, TINY);
    ggml_tensor * by_value  = ggml_cont(ctx, ggml_transpose(ctx, direction)); // [n, head_size, n_head_kv]
    ggml_tensor * sum       = ggml_reshape_3d(ctx, ggml_sum_rows(ctx, by_value), keys->ne[0], 1, keys->ne[2]);
    ggml_tensor * anchor    = ggml_l2_norm(ctx, sum, TINY);
    return ggml_scale(ctx, mul_mat_f32(ctx, direction, anchor), -1.0f);
}

// Scores [layers of the part, n_head_kv, n] to their layers of [n_layer, n_head_kv, n_all], from token `first` on.
void spread(const device_part & part, const std::vector<float> & found, size_t n, size_t n_head_kv, size_t first, size_t n_all,
            float * scores) {
    for (size_t l = 0; l < part.layers.size(); ++l) {
        for (size_t h = 0; h < n_head_kv; ++h) {
            std::copy_n(found.data() + (l * n_head_kv + h) * n, n, scores + (part.layers[l].il * n_head_kv + h) * n_all + first);
        }
    }
}

} // namespace

void in_place::score(int32_t scorer, const std::vector<uint32_t> & at, float * scores) {
    const size_t               n = at.size(), H = shape.n_head_kv;
    const std::vector<int32_t> cells(at.begin(), at.end());
    for (device_part & part : parts) {
        const size_t   L = part.layers.size();
        device_graph   graph(*part.on, 16 + 16 * L);
        ggml_context * ctx  = graph.ctx();
        ggml_tensor *  from = graph.input(GGML_TYPE_I32, int64_t(n), 1, 1, cells.data());
        ggml_tensor *  out  = graph.output(GGML_TYPE_F32, int64_t(n), int64_t(H), int64_t(L));
        for (size_t l = 0; l < L; ++l) {
            auto *        table = const_cast<ggml_tensor *>(part.layers[l].k);
            ggml_tensor * keys  = gather(ctx, table, from, shape.head_size_k, int64_t(H));
            ggml_tensor * found = scorer == KVP_SCORER_KNORM ? knorm(ctx, keys) : keydiff(ctx, keys);
            graph.compute(ggml_cpy(ctx, ggml_reshape_2d(ctx, found, int64_t(n), int64_t(H)),
                                   ggml_view_2d(ctx, out, int64_t(n), int64_t(H), out->nb[1], l * out->nb[2])));
        }
        graph.prepare();
        graph.run();
        std::vector<float> found(n * H * L);
        part.on->get(out, found.data(), found.size() * sizeof(float));
        spread(part, found, n, H, 0, n, scores);
    }
}

std::vector<float> in_place::look(const std::vector<uint32_t> & at) {
    const size_t       n = at.size(), H = shape.n_head_kv;
    std::vector<float> norms(n * H);
    if (on_host(0)) {
        std::vector<float> keys(n * H * shape.head_size_k);
        read_k(host[0], at, H * shape.head_size_k, 0, keys.data());
        score_knorm(keys.data(), n, H, shape.head_size_k, norms.data());
        return norms;
    }
    const std::vector<int32_t> cells(at.begin(), at.end());
    device_part &              part = parts.front(); // the first layer that is not on the host is its first
    device_graph               graph(*part.on, 32);
    ggml_tensor *              from = graph.input(GGML_TYPE_I32, int64_t(n), 1, 1, cells.data());
    auto *                     table = const_cast<ggml_tensor *>(part.layers.front().k);
    ggml_tensor *              found = knorm(graph.ctx(), gather(graph.ctx(), table, from, shape.head_size_k, int64_t(H)));
    ggml_set_output(found);
    graph.compute(found);
    graph.prepare();
    graph.run();
    part.on->get(found, norms.data(), norms.size() * sizeof(float));
    return norms;
}

void in_place::score(policy_network & network, const std::vector<slot> & slots, const std::vector<uint32_t> & at, float * scores) {
    constexpr size_t CHUNK = 2048; // tokens per graph, so that its memory does not grow with the cache
    const size_t     H = shape.n_head_kv, half = network.shape().context / 2, h = network.shape().hidden;
    for (device_part & part : parts) {
        const size_t L = part.layers.size();
        if (!part.policy || part.policy->network != network.id()) {
            std::vector<uint32_t> layers;
            for (const device_layer & layer : part.layers) {
                layers.push_back(layer.il);
            }
            part.policy.reset();
            part.policy = std::make_unique<device_policy>(network, *part.on, layers, shape.k_rotation, shape.v_rotation);
        }
        const device_policy & p = *part.policy;
        for (size_t first = 0; first < slots.size(); first += CHUNK) {
            const size_t n_out = std::min(CHUNK, slots.size() - first), n_in = n_out + 2 * half;
            // A slot without a token reads a token's cell and multiplies it by nothing, its 1 included.
            std::vector<int32_t> cells(n_in, int32_t(at.front()));
            std::vector<float>   there(n_in, 0.0f), features(n_in * POSITION_ROW, 0.0f);
            for (size_t i = 0; i < n_in; ++i) {
                const size_t here = first + i; // counted with the empty slots before the first token
                if (here < half || here - half >= slots.size() || slots[here - half].index < 0) {
                    continue;
                }
                const slot & token = slots[here - half];
                cells[i]           = int32_t(at[size_t(token.index)]);
                there[i]           = 1.0f;
                std::copy_n(token.position, N_POSITION, features.begin() + std::ptrdiff_t(i * POSITION_ROW));
                features[i * POSITION_ROW + N_POSITION] = 1.0f;
            }
            const int64_t  end = *std::max_element(cells.begin(), cells.end()) + int64_t(1);
            device_graph   graph(*part.on, 64 + 24 * L + 4 * network.shape().context);
            ggml_context * ctx      = graph.ctx();
            ggml_tensor *  from     = graph.input(GGML_TYPE_I32, int64_t(n_in), 1, 1, cells.data());
            ggml_tensor *  exists   = graph.input(GGML_TYPE_F32, 1, int64_t(n_in), 1, there.data());
            ggml_tensor *  position = graph.input(GGML_TYPE_F32, POSITION_ROW, int64_t(n_in), 1, features.data());
            ggml_tensor *  seen     = graph.output(GGML_TYPE_F32, int64_t(h), int64_t(n_in), int64_t(H * L));
            for (size_t l = 0; l < L; ++l) {
                auto * k = const_cast<ggml_tensor *>(part.layers[l].k);
                auto * v = const_cast<ggml_tensor *>(part.layers[l].v);
                if (shape.v_transposed) {
                    v = as_rows(ctx, v, end);
                }
                ggml_tensor * u = ggml_add(ctx, mul_mat_f32(ctx, p.of_layer(ctx, p.key, l), gather(ctx, k, from, shape.head_size_k, int64_t(H))),
                                           mul_mat_f32(ctx, p.of_layer(ctx, p.value, l), gather(ctx, v, from, shape.head_size_v, int64_t(H))));
                graph.compute(ggml_cpy(ctx, u, ggml_view_3d(ctx, seen, int64_t(h), int64_t(n_in), int64_t(H), seen->nb[1], seen->nb[2], l * H * seen->nb[2])));
            }
            ggml_tensor * place = ggml_reshape_3d(ctx, mul_mat_f32(ctx, p.position, position), int64_t(h), int64_t(H * L), int64_t(n_in));
            ggml_tensor * u     = ggml_add(ctx, ggml_mul(ctx, seen, exists), ggml_permute(ctx, place, 0, 2, 1, 3));
            ggml_tensor * score = score_graph(ctx, u, p, int64_t(n_out)); // [1, n_out, H * L]
            ggml_set_output(score);
            graph.compute(score);
            graph.prepare();
            graph.run();

            std::vector<float> found(n_out * H * L);
            part.on->get(score, found.data(), found.size() * sizeof(float));
            for (size_t i = 0; i < n_out; ++i) {
                const int32_t token = slots[first + i].index;
                for (size_t g = 0; token >= 0 && g < H * L; ++g) {
                    scores[(part.layers[g / H].il * H + g % H) * at.size() + size_t(token)] = found[g * n_out + i];
                }
            }
        }
    }
}

} // namespace kvp
