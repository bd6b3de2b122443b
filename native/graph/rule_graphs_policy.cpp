// The rule of a learned policy, whose network runs in chunks of tokens.
#include "graph/graph_rows.h"
#include "graph/rule_graphs.h"

#include <algorithm>

namespace kvp {

void graphs_of_policy(const rows_in_place & where, const kvp_rule & rule, float * scores) {
    if (where.parts.empty()) {
        return;
    }
    constexpr size_t        CHUNK   = 2048; // tokens per graph, so that its memory does not grow with the cache
    policy_network &        network = rule.of.policy.policy->network;
    const kvp_cache_shape & shape   = where.shape;
    const auto &            at      = where.cells;
    const size_t            H = shape.n_head_kv, half = network.shape().context / 2, h = network.shape().hidden;
    const size_t            G = network.shape().n_networks; // of a layer
    const auto              slots = with_gaps(rule.of.policy.indices, uint32_t(at.size()), uint32_t(half));
    for (device_part * each : where.parts) {
        device_part & part = *each;
        const size_t L = part.layers.size();
        if (!part.policy || part.policy->network != network.id()) {
            std::vector<uint32_t> layers;
            for (const device_layer & layer : part.layers) {
                layers.push_back(layer.il);
            }
            part.policy.reset();
            part.policy = std::make_unique<device_policy>(network, *part.on, layers, shape.k_hadamard_block, shape.v_hadamard_block);
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
            ggml_tensor *  seen     = graph.output(GGML_TYPE_F32, int64_t(h), int64_t(n_in), int64_t(G * L));
            for (size_t l = 0; l < L; ++l) {
                auto * k = const_cast<ggml_tensor *>(part.layers[l].k);
                auto * v = const_cast<ggml_tensor *>(part.layers[l].v);
                if (shape.v_transposed) {
                    v = as_rows(ctx, v, end);
                }
                // a row of the cache has its heads side by side, as a network sees them
                ggml_tensor * keys   = gather(ctx, k, from, int64_t(network.key_size()), int64_t(G));
                ggml_tensor * values = gather(ctx, v, from, int64_t(network.value_size()), int64_t(G));
                ggml_tensor * u = ggml_add(ctx, mul_mat_f32(ctx, p.of_layer(ctx, p.key, l), keys), mul_mat_f32(ctx, p.of_layer(ctx, p.value, l), values));
                graph.compute(ggml_cpy(ctx, u, ggml_view_3d(ctx, seen, int64_t(h), int64_t(n_in), int64_t(G), seen->nb[1], seen->nb[2], l * G * seen->nb[2])));
            }
            ggml_tensor * place = ggml_reshape_3d(ctx, mul_mat_f32(ctx, p.position, position), int64_t(h), int64_t(G * L), int64_t(n_in));
            ggml_tensor * u     = ggml_add(ctx, ggml_mul(ctx, seen, exists), ggml_permute(ctx, place, 0, 2, 1, 3));
            ggml_tensor * score = score_graph(ctx, u, p, int64_t(n_out)); // [H / G, n_out, G * L]
            ggml_set_output(score);
            graph.compute(score);
            graph.prepare();
            graph.run();

            std::vector<float> found(n_out * H * L);
            part.on->get(score, found.data(), found.size() * sizeof(float));
            for (size_t i = 0; i < n_out; ++i) {
                const int32_t token = slots[first + i].index;
                for (size_t head = 0; token >= 0 && head < H * L; ++head) {
                    scores[(part.layers[head / H].il * H + head % H) * at.size() + size_t(token)] = found[network.place(head, i, n_out)];
                }
            }
        }
    }
}

} // namespace kvp
