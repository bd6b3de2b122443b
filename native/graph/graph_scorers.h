// Scores as ggml graphs, of one layer on the device that holds it. Larger = keep.
#pragma once

#include "ggml.h"

namespace kvp {

// Rows, as the cache gives them: f32 [head_size, n, n_head_kv], n_head_kv slowest, as ggml writes shapes.

// [n, n_head_kv]: host_rules.h has the same two for rows in memory. Neither changes under a rotation of the rows.
ggml_tensor * graph_knorm(ggml_context * ctx, ggml_tensor * keys);
ggml_tensor * graph_keydiff(ggml_context * ctx, ggml_tensor * keys);

// The largest number of a row minus the smallest: [n, n_head_kv]. VaSE, arXiv:2606.03928.
ggml_tensor * graph_range(ggml_context * ctx, ggml_tensor * rows);

// The rows in partitions of `lag`, each but the last measured by the next one: softmax over the partition's tokens
// of the standard deviation over channels of (x - min) / (max - min), the extremes those of the next
// partition's tokens. [lag * (partitions - 1), n_head_kv]. LagKV, arXiv:2504.04704, section 2.2.
ggml_tensor * graph_lag(ggml_context * ctx, ggml_tensor * rows, int64_t lag);

// Attention that m queries of every query head pay to keys, summed over queries and averaged over a KV head's
// group: [n, n_head_kv]. `queries` [head_size, m * group, n_head_kv], those of one query head side by side, are
// of tokens `query_indices` [1, m], the keys of tokens `key_indices` [n, 1, n_head_kv], both f32; a query sees its own token and
// those before. One that sees none pays every key the same.
ggml_tensor * graph_attention(ggml_context * ctx, ggml_tensor * keys, ggml_tensor * queries, ggml_tensor * query_indices,
                              ggml_tensor * key_indices, float scale);

// What queries to come are expected to pay, times the values' norms: [n, n_head_kv]. `means` [head_size, group,
// n_head_kv] and `covariances` [head_size * head_size, group, n_head_kv] of each query head's; `hidden` [n, 1,
// n_head_kv] is 1 for tokens left out, else 0. Expected Attention, arXiv:2510.00636, section 3.
ggml_tensor * graph_expected_attention(ggml_context * ctx, ggml_tensor * keys, ggml_tensor * values, ggml_tensor * means,
                                       ggml_tensor * covariances, ggml_tensor * hidden, float scale);

} // namespace kvp
