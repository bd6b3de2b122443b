#include "graph/rule_graphs.h"

#include "graph/graph_rows.h"
#include "graph/graph_scorers.h"

#include <algorithm>

namespace kvp {

namespace {

constexpr size_t MOST_LOGITS = size_t(1) << 24; // of one layer at a time: 64 MiB, and as much for what is made of them

// scores f32 [n_layer, n_head_kv, width] of the part's layers: score(graph, rows, l) makes the nodes of its layer
// number l, [width, n_head_kv].
template <typename Score>
void score_part(device_part & part, const rows_in_place & where, size_t width, size_t most_nodes, Score score, float * scores) {
    const std::vector<int32_t> cells(where.cells.begin(), where.cells.end());

    const size_t  L = part.layers.size(), H = where.shape.n_head_kv;
    device_graph  graph(*part.on, 16 + (32 + most_nodes) * L);
    graph_rows    rows(graph, part, where.shape, cells);
    ggml_tensor * out = graph.output(GGML_TYPE_F32, int64_t(width), int64_t(H), int64_t(L));
    for (size_t l = 0; l < L; ++l) {
        ggml_tensor * layer = ggml_view_2d(graph.ctx(), out, int64_t(width), int64_t(H), out->nb[1], l * out->nb[2]);
        graph.compute(ggml_cpy(graph.ctx(), score(graph, rows, l), layer));
    }
    graph.prepare();
    graph.run();
    std::vector<float> found(width * H * L);
    part.on->get(out, found.data(), found.size() * sizeof(float));
    for (size_t l = 0; l < L; ++l) {
        std::copy_n(found.data() + l * H * width, H * width, scores + part.layers[l].il * H * width);
    }
}

// Of numbers [n_layer, per_layer] those of the part's layers, as floats.
template <typename T> std::vector<float> of_layers(const device_part & part, const T * all, size_t per_layer) {
    std::vector<float> some;
    some.reserve(part.layers.size() * per_layer);
    for (const device_layer & layer : part.layers) {
        some.insert(some.end(), all + layer.il * per_layer, all + (layer.il + 1) * per_layer);
    }
    return some;
}

} // namespace

void graphs_of_knorm(const rows_in_place & where, const kvp_rule &, float * scores) {
    for (device_part * part : where.parts) {
        score_part(*part, where, where.cells.size(), 16, [](device_graph & graph, graph_rows & rows, size_t l) {
            return graph_knorm(graph.ctx(), rows.stored_keys(l));
        }, scores);
    }
}

void graphs_of_keydiff(const rows_in_place & where, const kvp_rule &, float * scores) {
    for (device_part * part : where.parts) {
        score_part(*part, where, where.cells.size(), 16, [](device_graph & graph, graph_rows & rows, size_t l) {
            return graph_keydiff(graph.ctx(), rows.stored_keys(l));
        }, scores);
    }
}

void graphs_of_range(const rows_in_place & where, const kvp_rule &, float * scores) {
    for (device_part * part : where.parts) {
        score_part(*part, where, where.cells.size(), 16, [](device_graph & graph, graph_rows & rows, size_t l) {
            return graph_range(graph.ctx(), rows.values(l));
        }, scores);
    }
}

void graphs_of_lag(const rows_in_place & where, const kvp_rule & rule, float * scores) {
    const kvp_rule_lag &        how   = rule.of.lag;
    const auto                  first = where.cells.begin() + how.first;
    const std::vector<uint32_t> some(first, first + how.lag * how.n_parts);
    const rows_in_place         parted{ where.parts, where.shape, some };
    for (device_part * part : where.parts) {
        score_part(*part, parted, some.size() - how.lag, 64, [&](device_graph & graph, graph_rows & rows, size_t l) {
            ggml_context * ctx = graph.ctx();
            return ggml_scale(ctx, ggml_add(ctx, graph_lag(ctx, rows.keys(l), how.lag), graph_lag(ctx, rows.values(l), how.lag)), 0.5f);
        }, scores);
    }
}

void graphs_of_attention(const rows_in_place & where, const kvp_rule & rule, float * paid) {
    const kvp_rule_attention & batch = rule.of.attention;
    const kvp_cache_shape &    shape = where.shape;
    const kvp_token_index *    index = batch.key_indices;
    const size_t               n = where.cells.size(), H = shape.n_head_kv, group = batch.n_head / H, size = shape.head_size_k;
    const size_t               step = std::max<size_t>(1, MOST_LOGITS / (n * batch.n_head)); // queries per graph
    std::fill_n(paid, shape.n_layer * H * n, 0.0f);
    std::vector<float> some(shape.n_layer * H * n);
    for (device_part * part : where.parts) {
        const auto key_indices = of_layers(*part, index, H * n);
        for (size_t first = 0; first < batch.n_queries; first += step) {
            const size_t             m = std::min<size_t>(step, batch.n_queries - first);
            const std::vector<float> query_indices(batch.query_indices + first, batch.query_indices + first + m);
            std::vector<float>       queries;
            for (const device_layer & layer : part->layers) {
                for (size_t h = 0; h < batch.n_head; ++h) {
                    const float * from = batch.queries + ((layer.il * batch.n_head + h) * batch.n_queries + first) * size;
                    queries.insert(queries.end(), from, from + m * size);
                }
            }
            ggml_tensor *q = nullptr, *at_query = nullptr, *at_key = nullptr;
            // most nodes: 24 halvings of as many rows as there may be logits, five nodes each, and thirty others
            score_part(*part, where, n, 160, [&](device_graph & graph, graph_rows & rows, size_t l) {
                ggml_context * ctx = graph.ctx();
                if (!q) {
                    q        = graph.input(GGML_TYPE_F32, int64_t(size), int64_t(m * group), int64_t(H * part->layers.size()), queries.data());
                    at_query = graph.input(GGML_TYPE_F32, 1, int64_t(m), 1, query_indices.data());
                    at_key   = graph.input(GGML_TYPE_F32, int64_t(n), 1, int64_t(H * part->layers.size()), key_indices.data());
                }
                const auto of_layer = [&](ggml_tensor * x) {
                    return ggml_view_3d(ctx, x, x->ne[0], x->ne[1], int64_t(H), x->nb[1], x->nb[2], l * H * x->nb[2]);
                };
                return graph_attention(ctx, rows.keys(l), of_layer(q), at_query, of_layer(at_key), batch.scale[part->layers[l].il]);
            }, some.data());
            for (const device_layer & layer : part->layers) {
                for (size_t g = layer.il * H; g < (layer.il + 1) * H; ++g) {
                    const int32_t oldest  = *std::min_element(index + g * n, index + (g + 1) * n);
                    const auto    blind   = std::count_if(query_indices.begin(), query_indices.end(), [&](float i) { return i < float(oldest); });
                    const float   of_none = float(blind) / float(n); // what those that see nothing are said to pay
                    for (size_t i = g * n; i < (g + 1) * n; ++i) {
                        paid[i] += some[i] - of_none;
                    }
                }
            }
        }
    }
}

void graphs_of_expected(const rows_in_place & where, const kvp_rule & rule, float * paid) {
    const kvp_rule_expected & expected = rule.of.expected;
    const size_t              n = where.cells.size(), H = where.shape.n_head_kv, group = expected.n_head / H, size = where.shape.head_size_k;
    for (device_part * part : where.parts) {
        const auto   means       = of_layers(*part, expected.means, expected.n_head * size);
        const auto   covariances = of_layers(*part, expected.covariances, expected.n_head * size * size);
        const auto   out         = of_layers(*part, expected.left_out, H * n);
        const auto   heads       = int64_t(H * part->layers.size());
        ggml_tensor *mean = nullptr, *covariance = nullptr, *hidden = nullptr;
        score_part(*part, where, n, 16 + 20 * group, [&](device_graph & graph, graph_rows & rows, size_t l) {
            ggml_context * ctx = graph.ctx();
            if (!mean) {
                mean       = graph.input(GGML_TYPE_F32, int64_t(size), int64_t(group), heads, means.data());
                covariance = graph.input(GGML_TYPE_F32, int64_t(size * size), int64_t(group), heads, covariances.data());
                hidden     = graph.input(GGML_TYPE_F32, int64_t(n), 1, heads, out.data());
            }
            const auto of_layer = [&](ggml_tensor * x) {
                return ggml_view_3d(ctx, x, x->ne[0], x->ne[1], int64_t(H), x->nb[1], x->nb[2], l * H * x->nb[2]);
            };
            return graph_expected_attention(ctx, rows.keys(l), rows.values(l), of_layer(mean), of_layer(covariance), of_layer(hidden),
                                            expected.scale[part->layers[l].il]);
        }, paid);
    }
}

} // namespace kvp
