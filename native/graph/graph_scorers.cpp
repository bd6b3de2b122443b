#include "graph/graph_scorers.h"

#include "graph/device.h"

#include <cfloat>

namespace kvp {

namespace {

constexpr float TINY   = 1e-12f; // as in host_rules.cpp and kvp_edge/policies/lagkv.py
constexpr float UNSEEN = -1e30f; // added to a logit; an infinity would make a row that sees nothing NaN

// Over windows of k0 x k1 numbers that do not overlap.
ggml_tensor * largest(ggml_context * ctx, ggml_tensor * x, int64_t k0, int64_t k1) {
    return ggml_pool_2d(ctx, x, GGML_OP_POOL_MAX, int(k0), int(k1), int(k0), int(k1), 0, 0);
}
ggml_tensor * smallest(ggml_context * ctx, ggml_tensor * x, int64_t k0, int64_t k1) {
    return ggml_neg(ctx, largest(ctx, ggml_neg(ctx, x), k0, k1));
}
// [n, 1, heads] from [n, rows, heads]: halves are added until one row is left, which every device does side by side.
ggml_tensor * sum_over_rows(ggml_context * ctx, ggml_tensor * x) {
    const auto rows = [&](int64_t first, int64_t last) {
        return ggml_view_3d(ctx, x, x->ne[0], last - first, x->ne[2], x->nb[1], x->nb[2], size_t(first) * x->nb[1]);
    };
    ggml_tensor * odd = nullptr;
    while (x->ne[1] > 1) {
        const int64_t half = x->ne[1] / 2;
        if (x->ne[1] % 2 != 0) {
            ggml_tensor * last = rows(2 * half, 2 * half + 1);
            odd                = odd ? ggml_add(ctx, odd, last) : ggml_cont(ctx, last);
        }
        x = ggml_add(ctx, rows(0, half), rows(half, 2 * half));
    }
    return odd ? ggml_add(ctx, x, odd) : x;
}

// [n, n_head_kv] from rows [head_size, n, n_head_kv]
ggml_tensor * norms(ggml_context * ctx, ggml_tensor * rows) {
    ggml_tensor * norm = ggml_sqrt(ctx, ggml_sum_rows(ctx, ggml_sqr(ctx, rows)));
    return ggml_reshape_2d(ctx, norm, rows->ne[1], rows->ne[2]);
}

} // namespace

ggml_tensor * graph_knorm(ggml_context * ctx, ggml_tensor * keys) { return ggml_neg(ctx, norms(ctx, keys)); }

ggml_tensor * graph_keydiff(ggml_context * ctx, ggml_tensor * keys) {
    ggml_tensor * direction = ggml_l2_norm(ctx, keys, TINY);
    ggml_tensor * by_value  = ggml_cont(ctx, ggml_transpose(ctx, direction)); // [n, head_size, n_head_kv]
    ggml_tensor * sum       = ggml_reshape_3d(ctx, ggml_sum_rows(ctx, by_value), keys->ne[0], 1, keys->ne[2]);
    ggml_tensor * cosine    = mul_mat_f32(ctx, direction, ggml_l2_norm(ctx, sum, TINY)); // [n, 1, n_head_kv]
    return ggml_neg(ctx, ggml_reshape_2d(ctx, cosine, keys->ne[1], keys->ne[2]));
}

ggml_tensor * graph_range(ggml_context * ctx, ggml_tensor * rows) {
    const int64_t size  = rows->ne[0];
    ggml_tensor * range = ggml_sub(ctx, largest(ctx, rows, size, 1), smallest(ctx, rows, size, 1)); // [1, n, n_head_kv]
    return ggml_reshape_2d(ctx, range, rows->ne[1], rows->ne[2]);
}

ggml_tensor * graph_lag(ggml_context * ctx, ggml_tensor * rows, int64_t lag) {
    const int64_t size = rows->ne[0], parts = rows->ne[1] / lag, heads = rows->ne[2];
    // [head_size, 1, parts - 1, n_head_kv] of every partition but the first
    const auto of_next = [&](ggml_tensor * x) { // [head_size, parts, n_head_kv]
        return ggml_cont(ctx, ggml_view_4d(ctx, x, size, 1, parts - 1, heads, x->nb[1], x->nb[1], x->nb[2], x->nb[1]));
    };
    ggml_tensor * low   = of_next(smallest(ctx, rows, 1, lag));
    ggml_tensor * range = ggml_clamp(ctx, ggml_sub(ctx, of_next(largest(ctx, rows, 1, lag)), low), TINY, FLT_MAX);
    ggml_tensor * own   = ggml_view_4d(ctx, rows, size, lag, parts - 1, heads, rows->nb[1], lag * rows->nb[1], rows->nb[2], 0);
    ggml_tensor * z     = ggml_div(ctx, ggml_sub(ctx, ggml_cont(ctx, own), low), range);
    ggml_tensor * away  = ggml_sub(ctx, z, ggml_mean(ctx, z));
    ggml_tensor * var   = ggml_scale(ctx, ggml_sum_rows(ctx, ggml_sqr(ctx, away)), 1.0f / float(size - 1));
    ggml_tensor * share = ggml_soft_max(ctx, ggml_reshape_3d(ctx, ggml_sqrt(ctx, var), lag, parts - 1, heads));
    return ggml_reshape_2d(ctx, share, lag * (parts - 1), heads);
}

ggml_tensor * graph_attention(ggml_context * ctx, ggml_tensor * keys, ggml_tensor * queries, ggml_tensor * query_indices,
                              ggml_tensor * key_indices, float scale) {
    const int64_t n = keys->ne[1], m = query_indices->ne[1], heads = keys->ne[2], group = queries->ne[1] / m;
    // whole numbers: the step is 1 where query_indices >= key_indices, else 0
    ggml_tensor * all   = ggml_repeat_4d(ctx, query_indices, n, m, heads, 1);
    ggml_tensor * seen  = ggml_step(ctx, ggml_scale_bias(ctx, ggml_sub(ctx, all, key_indices), 1.0f, 0.5f));
    ggml_tensor * mask  = ggml_reshape_4d(ctx, ggml_scale_bias(ctx, seen, -UNSEEN, UNSEEN), n, m, 1, heads);
    ggml_tensor * logit = ggml_reshape_4d(ctx, mul_mat_f32(ctx, keys, queries), n, m, group, heads);
    ggml_tensor * paid  = ggml_reshape_3d(ctx, ggml_soft_max_ext(ctx, logit, mask, scale, 0.0f), n, m * group, heads);
    return ggml_scale(ctx, ggml_reshape_2d(ctx, sum_over_rows(ctx, paid), n, heads), 1.0f / float(group));
}

ggml_tensor * graph_expected_attention(ggml_context * ctx, ggml_tensor * keys, ggml_tensor * values, ggml_tensor * means,
                                       ggml_tensor * covariances, ggml_tensor * hidden, float scale) {
    const int64_t size = keys->ne[0], n = keys->ne[1], heads = keys->ne[2], group = means->ne[1];
    ggml_tensor * sum = nullptr;
    for (int64_t g = 0; g < group; ++g) { // one at a time, as [head_size, n, n_head_kv] is as large as all keys
        ggml_tensor * mean = ggml_cont(ctx, ggml_view_3d(ctx, means, size, 1, heads, means->nb[1], means->nb[2], size_t(g) * means->nb[1]));
        ggml_tensor * covariance = ggml_cont(ctx, ggml_view_3d(ctx, covariances, size, size, heads, size_t(size) * sizeof(float),
                                                               covariances->nb[2], size_t(g) * covariances->nb[1]));
        ggml_tensor * spread = mul_mat_f32(ctx, covariance, keys); // it is symmetric
        ggml_tensor * square = ggml_sum_rows(ctx, ggml_mul(ctx, spread, keys)); // [1, n, n_head_kv]
        ggml_tensor * logits = ggml_add(ctx, ggml_scale(ctx, mul_mat_f32(ctx, keys, mean), scale),
                                        ggml_scale(ctx, ggml_reshape_3d(ctx, square, n, 1, heads), scale * scale / 2));
        ggml_tensor * paid   = ggml_soft_max(ctx, ggml_add(ctx, logits, ggml_scale(ctx, hidden, UNSEEN)));
        sum                  = sum ? ggml_add(ctx, sum, paid) : paid;
    }
    ggml_tensor * visible = ggml_scale_bias(ctx, hidden, -1.0f, 1.0f);
    ggml_tensor * mean    = ggml_scale(ctx, ggml_mul(ctx, sum, visible), 1.0f / float(group));
    return ggml_mul(ctx, ggml_reshape_2d(ctx, mean, n, heads), norms(ctx, values));
}

} // namespace kvp
