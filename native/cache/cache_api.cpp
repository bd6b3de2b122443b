// kvp_cache: the C interface to one context's KV cache.
#include "cache/cache.h"
#include "error.h"
#include "format/pack_state.h"
#include "graph/policy.h"
#include "scorers.h"

#include <algorithm>
#include <memory>

using namespace kvp;

namespace {

rope_shift shift_of(const kvp_rope_shift * shift, uint32_t hadamard_block) {
    rope_shift how;
    if (shift) {
        if (!shift->frequency || !shift->distance || shift->n_pairs == 0) {
            fail(KVP_ERR_ARGUMENT, "a shift of keys needs frequencies, distances and at least one pair");
        }
        how = { shift->frequency, shift->distance, shift->n_pairs, shift->neox != 0, hadamard_block };
    }
    return how;
}

// Calls on_device(rows) for tokens whose cells are known and then on_host(rows), which sees the layers that
// are not on a device; where a device is not able to, on_host alone, with all layers.
template <typename Device, typename Host>
void score_rows(kvp_cache & cache, int32_t p0, int32_t p1, uint32_t n, int32_t * positions, Device on_device,
                Host on_host) {
    token_rows tokens = cache.find_rows(p0, p1, n, positions, kvp_cache::from::anywhere);
    if (n > 0 && tokens.in_place) {
        try {
            on_device(tokens);
        } catch (const error & e) {
            if (e.code != KVP_ERR_UNSUPPORTED && e.code != KVP_ERR_MEMORY) {
                throw;
            }
            tokens = cache.find_rows(p0, p1, n, positions, kvp_cache::from::state);
        }
    }
    if (n > 0) {
        on_host(tokens);
    }
}

void check_heads(const kvp_cache & cache, uint32_t n_head) {
    if (n_head == 0 || n_head % cache.shape().n_head_kv != 0) {
        fail(KVP_ERR_ARGUMENT, "%u query heads do not divide among %u KV heads", n_head, cache.shape().n_head_kv);
    }
}

} // namespace

extern "C" {

int32_t kvp_cache_open(llama_context * ctx, kvp_observer * observer, kvp_cache ** cache, kvp_error * err) {
    return guard(err, [&] {
        if (!ctx || !cache) {
            fail(KVP_ERR_ARGUMENT, "kvp_cache_open: ctx and cache must not be NULL");
        }
        *cache = new kvp_cache(ctx, observer);
    });
}

void kvp_cache_close(kvp_cache * cache) { delete cache; }

void kvp_cache_get_shape(const kvp_cache * cache, kvp_cache_shape * shape) {
    if (cache && shape) {
        *shape = cache->shape();
    }
}

int32_t kvp_cache_read(kvp_cache * cache, kvp_llama_position p0, kvp_llama_position p1, uint32_t n,
                       kvp_llama_position * positions, float * keys, float * values, kvp_error * err) {
    return guard(err, [&] {
        if (!cache) {
            fail(KVP_ERR_ARGUMENT, "kvp_cache_read: cache must not be NULL");
        }
        cache->read(p0, p1, n, positions, keys, values);
    });
}

int32_t kvp_cache_score(kvp_cache * cache, int32_t scorer, int32_t p0, int32_t p1, uint32_t n, int32_t * positions,
                        float * scores, kvp_error * err) {
    return guard(err, [&] {
        if (!cache || !scores) {
            fail(KVP_ERR_ARGUMENT, "kvp_cache_score: cache and scores must not be NULL");
        }
        if (scorer != KVP_SCORER_KNORM && scorer != KVP_SCORER_KEYDIFF) {
            fail(KVP_ERR_ARGUMENT, "there is no native scorer number %d", scorer);
        }
        const auto   score  = scorer == KVP_SCORER_KNORM ? score_knorm : score_keydiff;
        const size_t n_head = cache->shape().n_head_kv;
        score_rows(
            *cache, p0, p1, n, positions, [&](const token_rows & tokens) { cache->found_location().score(scorer, tokens.order, scores); },
            [&](const token_rows & tokens) {
                cache->each_layer(tokens, false, [&](uint32_t il, const float * keys) {
                    score(keys, n, n_head, cache->shape().head_size_k, scores + il * n_head * n);
                });
            });
    });
}

int32_t kvp_cache_score_range(kvp_cache * cache, int32_t p0, int32_t p1, uint32_t n, float * scores, kvp_error * err) {
    return guard(err, [&] {
        if (!cache || !scores) {
            fail(KVP_ERR_ARGUMENT, "kvp_cache_score_range: cache and scores must not be NULL");
        }
        cache->in_place(p0, p1, n, [&](location & where, const std::vector<uint32_t> & cells) {
            where.score_range(cells, cache->n_threads(), scores);
        });
    });
}

int32_t kvp_cache_score_lag(kvp_cache * cache, int32_t p0, int32_t p1, uint32_t n, uint32_t first, uint32_t lag,
                            uint32_t n_parts, float * scores, kvp_error * err) {
    return guard(err, [&] {
        if (!cache || !scores) {
            fail(KVP_ERR_ARGUMENT, "kvp_cache_score_lag: cache and scores must not be NULL");
        }
        if (lag == 0 || n_parts < 2 || first > n || uint64_t(lag) * n_parts > n - first) {
            fail(KVP_ERR_ARGUMENT, "%u partitions of %u tokens from token %u on do not lie in %u tokens, or are not two", n_parts, lag, first, n);
        }
        cache->in_place(p0, p1, n, [&](location & where, const std::vector<uint32_t> & cells) {
            where.score_lag({ cells.begin() + first, cells.begin() + first + lag * n_parts }, lag, cache->n_threads(), scores);
        });
    });
}

int32_t kvp_cache_score_attention(kvp_cache * cache, int32_t p0, int32_t p1, uint32_t n,
                                  const kvp_query_batch * queries, const int32_t * held, float * paid,
                                  kvp_error * err) {
    return guard(err, [&] {
        if (!cache || !queries || !held || !paid || (queries->n > 0 && (!queries->queries || !queries->indices || !queries->scale))) {
            fail(KVP_ERR_ARGUMENT, "kvp_cache_score_attention: cache, queries, held and paid must not be NULL");
        }
        check_heads(*cache, queries->n_head);
        cache->in_place(p0, p1, n, [&](location & where, const std::vector<uint32_t> & cells) {
            where.score_attention(cells, *queries, held, cache->n_threads(), paid);
        });
    });
}

int32_t kvp_cache_score_expected(kvp_cache * cache, int32_t p0, int32_t p1, uint32_t n, const kvp_expected * expected,
                                 float * scores, kvp_error * err) {
    return guard(err, [&] {
        if (!cache || !expected || !scores || !expected->means || !expected->covariances || !expected->scale || !expected->left_out) {
            fail(KVP_ERR_ARGUMENT, "kvp_cache_score_expected: cache, expected and scores must not be NULL");
        }
        check_heads(*cache, expected->n_head);
        cache->in_place(p0, p1, n, [&](location & where, const std::vector<uint32_t> & cells) {
            where.score_expected(cells, *expected, cache->n_threads(), scores);
        });
    });
}

int32_t kvp_cache_score_policy(kvp_cache * cache, kvp_policy * policy, int32_t p0, int32_t p1, uint32_t n,
                               const int32_t * tokens, float * scores, kvp_error * err) {
    return guard(err, [&] {
        if (!cache || !policy || (n > 0 && (!tokens || !scores))) {
            fail(KVP_ERR_ARGUMENT, "kvp_cache_score_policy: cache, policy, tokens and scores must not be NULL");
        }
        const kvp_cache_shape &  c = cache->shape();
        const kvp_policy_shape & s = policy->network.shape();
        if (s.n_layer != c.n_layer || s.n_head_kv != c.n_head_kv || s.head_size_k != c.head_size_k ||
            s.head_size_v != c.head_size_v) {
            fail(KVP_ERR_ARGUMENT, "the policy scores %u layers x %u KV heads x %u+%u, and the cache holds %u x %u x %u+%u",
                 s.n_layer, s.n_head_kv, s.head_size_k, s.head_size_v, c.n_layer, c.n_head_kv, c.head_size_k, c.head_size_v);
        }
        check_tokens(tokens, n);
        std::vector<int32_t> positions(n + 1); // never without an address
        const auto           slots = with_gaps(tokens, n, s.context / 2);
        const size_t         H = c.n_head_kv, dk = c.head_size_k, dv = c.head_size_v;
        std::vector<float>   values(n * H * dv);
        score_rows(
            *cache, p0, p1, n, positions.data(),
            [&](const token_rows & found) { cache->found_location().score(policy->network, slots, found.order, scores); },
            [&](const token_rows & found) {
                cache->each_layer(found, false, [&](uint32_t il, const float * keys) {
                    read_v(found.layers[il], found.v_trans, found.order, H * dv, c.v_hadamard_block, values.data());
                    policy->network.score(il, { keys, H * dk, dk }, { values.data(), H * dv, dv }, slots.data(), slots.size(), n,
                                          cache->n_threads(), scores + il * H * n);
                });
            });
    });
}

int32_t kvp_cache_remove(kvp_cache * cache, const kvp_llama_position * present, const uint8_t * keep, uint32_t n,
                         uint32_t * n_ranges, kvp_error * err) {
    return guard(err, [&] {
        if (n_ranges) {
            *n_ranges = 0;
        }
        if (!cache || (n > 0 && (!present || !keep))) {
            fail(KVP_ERR_ARGUMENT, "kvp_cache_remove: cache, present and keep must not be NULL");
        }
        if (n == 0) {
            return;
        }
        const uint32_t ranges = cache->remove(present, keep, n);
        if (n_ranges) {
            *n_ranges = ranges;
        }
    });
}

int32_t kvp_cache_move(kvp_cache * cache, const kvp_llama_position * present, const kvp_llama_position * positions,
                       uint32_t n, kvp_error * err) {
    return guard(err, [&] {
        if (!cache || (n > 0 && (!present || !positions))) {
            fail(KVP_ERR_ARGUMENT, "kvp_cache_move: cache, present and positions must not be NULL");
        }
        cache->move(present, positions, n);
    });
}

int32_t kvp_cache_appended(kvp_cache * cache, kvp_llama_position first, uint32_t n, kvp_error * err) {
    return guard(err, [&] {
        if (!cache || first < 0) {
            fail(KVP_ERR_ARGUMENT, "kvp_cache_appended: there is no cache, or position %d", first);
        }
        cache->appended(first, n);
    });
}

void kvp_cache_forget(kvp_cache * cache) {
    if (cache) {
        cache->forget();
    }
}

void kvp_cache_get_location(const kvp_cache * cache, kvp_cache_location * location) {
    if (cache && location) {
        *location = cache->location_info();
    }
}

int32_t kvp_cache_check_cells(kvp_cache * cache, const kvp_llama_position * present, uint32_t n, uint32_t * known,
                              kvp_error * err) {
    return guard(err, [&] {
        if (!cache || !known || (n > 0 && !present)) {
            fail(KVP_ERR_ARGUMENT, "kvp_cache_check_cells: cache, present and known must not be NULL");
        }
        *known = cache->check_cells(present, n);
    });
}

int32_t kvp_cache_check_packing(kvp_cache * cache, kvp_error * err) {
    return guard(err, [&] {
        if (!cache) {
            fail(KVP_ERR_ARGUMENT, "kvp_cache_check_packing: cache must not be NULL");
        }
        cache->check_packing();
    });
}

int32_t kvp_cache_pack(kvp_cache * cache, const kvp_llama_position * present, uint32_t n, const kvp_row * keep,
                       const kvp_llama_position * positions, uint32_t n_keep, const kvp_rope_shift * shift,
                       kvp_error * err) {
    return guard(err, [&] {
        if (!cache || !present || !keep || !positions) {
            fail(KVP_ERR_ARGUMENT, "kvp_cache_pack: cache, present, keep and positions must not be NULL");
        }
        const kvp_cache_shape & s = cache->shape();
        cache->pack({ s.n_layer, s.n_head_kv, n, n_keep, present, keep, positions, shift_of(shift, s.k_hadamard_block) });
    });
}

int32_t kvp_cache_restore(kvp_cache * cache, const uint8_t * blob, size_t size, const kvp_llama_position * present,
                          uint32_t n, kvp_error * err) {
    return guard(err, [&] {
        if (!cache || !blob || !present) {
            fail(KVP_ERR_ARGUMENT, "kvp_cache_restore: cache, blob and present must not be NULL");
        }
        cache->restore(blob, size, present, n);
    });
}

int32_t kvp_cache_check_state(const kvp_cache * cache, const uint8_t * blob, size_t size,
                              const kvp_llama_position * present, uint32_t n, kvp_error * err) {
    return guard(err, [&] {
        if (!cache || !blob || !present) {
            fail(KVP_ERR_ARGUMENT, "kvp_cache_check_state: cache, blob and present must not be NULL");
        }
        cache->check_state(blob, size, present, n);
    });
}

int32_t kvp_state_pack(uint8_t * blob, size_t size, int32_t seq_id, uint32_t n_layer, uint32_t n_head_kv,
                       const kvp_llama_position * present, uint32_t n, const kvp_row * keep,
                       const kvp_llama_position * positions, uint32_t n_keep, const kvp_rope_shift * shift,
                       uint32_t k_hadamard_block, size_t * packed_size, kvp_error * err) {
    return guard(err, [&] {
        if (!blob || !present || !keep || !positions || !packed_size) {
            fail(KVP_ERR_ARGUMENT, "kvp_state_pack: blob, present, keep, positions and packed_size must not be NULL");
        }
        *packed_size = pack_state(blob, size, seq_id,
                                  { n_layer, n_head_kv, n, n_keep, present, keep, positions, shift_of(shift, k_hadamard_block) });
    });
}

} // extern "C"
