// The rules by which tokens are scored in place: a table with one row for each kind in kvp_edge.h. To add one:
// its kind and parameters in kvp_edge.h; a row here; ggml graphs (graph/rule_graphs.h, made of graph/graph_scorers.h)
// or a loop over rows in host memory (graph/host_rules.h), or both; and its parameters in kvp_edge/binding/rules.py.
#include "cache/cache.h"
#include "error.h"
#include "graph/policy.h"
#include "graph/rule_graphs.h"
#include "kvp_edge.h"
#include "graph/host_rules.h"

#include <algorithm>
#include <new>
#include <optional>
#include <string>
#include <vector>

namespace kvp {

namespace {

struct scoring_rule {
    int32_t kind; // enum kvp_rule_kind

    // Throws KVP_ERR_ARGUMENT unless the rule's parameters fit n tokens of this cache.
    void (*check)(const kvp_cache & cache, const kvp_rule & rule, uint32_t n);

    // Scores the layers in `where` by graphs.
    void (*by_graphs)(const rows_in_place & where, const kvp_rule & rule, float * scores);

    // Scores the layers in `rows`, which are in host memory or in a state. Null: there is no loop; graphs score the
    // layers in host memory, too, and where they cannot, nothing does.
    void (*on_rows)(kvp_cache & cache, const token_rows & rows, const kvp_rule & rule, float * scores);
};

// -- checks ------------------------------------------------------------------------------------

void fits_always(const kvp_cache &, const kvp_rule &, uint32_t) {}

void check_lag(const kvp_cache &, const kvp_rule & rule, uint32_t n) {
    const kvp_rule_lag & how = rule.of.lag;
    if (how.lag == 0 || how.n_parts < 2 || how.first > n || uint64_t(how.lag) * how.n_parts > n - how.first) {
        fail(KVP_ERR_ARGUMENT, "%u partitions of %u tokens from token %u on do not lie in %u tokens, or are not two", how.n_parts, how.lag,
             how.first, n);
    }
}

void check_heads(const kvp_cache & cache, uint32_t n_head) {
    if (n_head == 0 || n_head % cache.shape().n_head_kv != 0) {
        fail(KVP_ERR_ARGUMENT, "%u query heads do not divide among %u KV heads", n_head, cache.shape().n_head_kv);
    }
}

void check_attention(const kvp_cache & cache, const kvp_rule & rule, uint32_t) {
    const kvp_rule_attention & how = rule.of.attention;
    if (!how.key_indices || (how.n_queries > 0 && (!how.queries || !how.query_indices || !how.scale))) {
        fail(KVP_ERR_ARGUMENT, "the rule attention needs queries, their indices and scale, and the tokens held");
    }
    check_heads(cache, how.n_head);
}

void check_expected(const kvp_cache & cache, const kvp_rule & rule, uint32_t) {
    const kvp_rule_expected & how = rule.of.expected;
    if (!how.means || !how.covariances || !how.scale || !how.left_out) {
        fail(KVP_ERR_ARGUMENT, "the rule expected needs means, covariances, scale and what is left out");
    }
    check_heads(cache, how.n_head);
}

void check_policy(const kvp_cache & cache, const kvp_rule & rule, uint32_t n) {
    const kvp_rule_policy & how = rule.of.policy;
    if (!how.policy || (n > 0 && !how.indices)) {
        fail(KVP_ERR_ARGUMENT, "the rule policy needs a policy and the tokens' indices");
    }
    const kvp_cache_shape &  c = cache.shape();
    const kvp_policy_shape & s = how.policy->network.shape();
    if (s.n_layer != c.n_layer || s.n_head_kv != c.n_head_kv || s.head_size_k != c.head_size_k || s.head_size_v != c.head_size_v) {
        fail(KVP_ERR_ARGUMENT, "the policy scores %u layers x %u KV heads x %u+%u, and the cache holds %u x %u x %u+%u", s.n_layer, s.n_head_kv,
             s.head_size_k, s.head_size_v, c.n_layer, c.n_head_kv, c.head_size_k, c.head_size_v);
    }
    check_tokens(how.indices, n);
}

// -- loops over rows ---------------------------------------------------------------------------

template <void (*score)(const float * keys, size_t n, size_t n_head, size_t head_size, float * scores)>
void rows_by_keys(kvp_cache & cache, const token_rows & rows, const kvp_rule &, float * scores) {
    const size_t n = rows.order.size(), H = cache.shape().n_head_kv;
    cache.each_layer(rows, false, [&](uint32_t il, const float * keys) { score(keys, n, H, cache.shape().head_size_k, scores + il * H * n); });
}

void rows_by_policy(kvp_cache & cache, const token_rows & rows, const kvp_rule & rule, float * scores) {
    const kvp_cache_shape & c       = cache.shape();
    policy_network &        network = rule.of.policy.policy->network;
    const auto              n       = uint32_t(rows.order.size());
    const size_t            H = c.n_head_kv, dk = c.head_size_k, dv = c.head_size_v;
    const auto              slots = with_gaps(rule.of.policy.indices, n, network.shape().context / 2);
    std::vector<float>      values(n * H * dv);
    cache.each_layer(rows, false, [&](uint32_t il, const float * keys) {
        read_v(rows.layers[il], rows.v_trans, rows.order, H * dv, c.v_hadamard_block, values.data());
        network.score(il, { keys, H * dk, dk }, { values.data(), H * dv, dv }, slots.data(), slots.size(), n, cache.n_threads(),
                      scores + il * H * n);
    });
}

// -- the table ---------------------------------------------------------------------------------

constexpr scoring_rule RULES[] = {
    { KVP_RULE_KNORM, fits_always, graphs_of_knorm, rows_by_keys<score_knorm> },
    { KVP_RULE_KEYDIFF, fits_always, graphs_of_keydiff, rows_by_keys<score_keydiff> },
    { KVP_RULE_RANGE, fits_always, graphs_of_range, nullptr },
    { KVP_RULE_LAG, check_lag, graphs_of_lag, nullptr },
    { KVP_RULE_ATTENTION, check_attention, graphs_of_attention, nullptr },
    { KVP_RULE_EXPECTED, check_expected, graphs_of_expected, nullptr },
    { KVP_RULE_POLICY, check_policy, graphs_of_policy, rows_by_policy },
};

const scoring_rule & row_of(int32_t kind) {
    const auto row = std::find_if(std::begin(RULES), std::end(RULES), [&](const scoring_rule & r) { return r.kind == kind; });
    if (row == std::end(RULES)) {
        fail(KVP_ERR_ARGUMENT, "there is no rule number %d", kind);
    }
    return *row;
}

// Why the rows cannot be scored where they lie; nothing if they were. Other errors pass.
template <typename Graphs> std::optional<std::string> refusal(Graphs run) {
    try {
        run();
        return std::nullopt;
    } catch (const error & e) {
        if (e.code != KVP_ERR_UNSUPPORTED && e.code != KVP_ERR_MEMORY) {
            throw;
        }
        return e.message;
    } catch (const std::bad_alloc &) {
        return "out of memory";
    }
}

// Graphs on the devices, the loop for the other layers; where the graphs are refused, the loop alone, on a state.
void score_with_loop(kvp_cache & cache, const scoring_rule & row, const kvp_rule & rule, kvp_llama_position p0, kvp_llama_position p1, uint32_t n, float * scores) {
    std::vector<kvp_llama_position> positions(n + 1); // never without an address
    token_rows                      rows = cache.find_rows(p0, p1, n, positions.data(), kvp_cache::from::anywhere);
    if (n == 0) {
        return;
    }
    if (rows.in_place && refusal([&] { row.by_graphs({ cache.device_parts(), cache.shape(), rows.order }, rule, scores); })) {
        rows = cache.find_rows(p0, p1, n, positions.data(), kvp_cache::from::state);
    }
    row.on_rows(cache, rows, rule, scores);
}

// Graphs for all layers, or KVP_NOT_IN_PLACE.
void score_by_graphs(kvp_cache & cache, const scoring_rule & row, const kvp_rule & rule, kvp_llama_position p0, kvp_llama_position p1, uint32_t n, float * scores) {
    const auto reason = refusal([&] {
        cache.in_place(p0, p1, n, [&](location & where, const std::vector<kvp_cell_index> & cells) {
            row.by_graphs({ where.with_host(cache.n_threads()), cache.shape(), cells }, rule, scores);
        });
    });
    if (reason) {
        fail(KVP_NOT_IN_PLACE, "%s", reason->c_str());
    }
}

} // namespace

} // namespace kvp

int32_t kvp_cache_score(kvp_cache * cache, const kvp_rule * rule, kvp_llama_position p0, kvp_llama_position p1, uint32_t n, float * scores, kvp_error * err) {
    using namespace kvp;
    return guard(err, [&] {
        if (!cache || !rule || !scores) {
            fail(KVP_ERR_ARGUMENT, "kvp_cache_score: cache, rule and scores must not be NULL");
        }
        const scoring_rule & row = row_of(rule->kind);
        row.check(*cache, *rule, n);
        (row.on_rows ? score_with_loop : score_by_graphs)(*cache, row, *rule, p0, p1, n, scores);
    });
}
