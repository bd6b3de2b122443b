// kvp_cache: the C interface to one context's KV cache.
#include "cache.h"

#include "error.h"
#include "policy.h"
#include "scorers.h"

#include <algorithm>
#include <cstring>

using namespace kvp;

namespace {

rope_shift shift_of(const kvp_rope_shift * shift, uint32_t rotation) {
    rope_shift how;
    if (shift) {
        if (!shift->frequency || !shift->distance || shift->n_pairs == 0) {
            fail(KVP_ERR_ARGUMENT, "a shift of keys needs frequencies, distances and at least one pair");
        }
        how = { shift->frequency, shift->distance, shift->n_pairs, shift->neox != 0, rotation };
    }
    return how;
}

// Calls on_device(rows) for tokens whose cells are known and then on_host(rows), which sees the layers that
// are not on a device; where a device is not able to, on_host alone, with all layers.
template <typename Device, typename Host>
void score_rows(kvp_cache & cache, int32_t p0, int32_t p1, uint32_t n, int32_t * positions, Device on_device, Host on_host) {
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
    if (n_head == 0 || n_head % cache.shape.n_head_kv != 0) {
        fail(KVP_ERR_ARGUMENT, "%u query heads do not divide among %u KV heads", n_head, cache.shape.n_head_kv);
    }
}

} // namespace

extern "C" {

int32_t      kvp_abi_version(void) { return KVP_ABI_VERSION; }
const char * kvp_built_for(void) { return KVP_BUILT_FOR; }
const char * kvp_built_llama_version(void) { return KVP_BUILT_LLAMA_VERSION; }
const char * kvp_loaded_llama_version(void) { return llama_version(); }

int32_t kvp_cache_open(llama_context * ctx, kvp_watch * watch, kvp_cache ** cache, kvp_error * err) {
    return guard(err, [&] {
        if (!ctx || !cache) {
            fail(KVP_ERR_ARGUMENT, "kvp_cache_open: ctx and cache must not be NULL");
        }
        std::unique_ptr<kvp_cache> opened(new kvp_cache{});
        opened->ctx   = ctx;
        opened->watch = watch;
        opened->open();
        *cache = opened.release();
    });
}

void kvp_cache_close(kvp_cache * cache) { delete cache; }

void kvp_cache_get_shape(const kvp_cache * cache, kvp_cache_shape * shape) {
    if (cache && shape) {
        *shape = cache->shape;
    }
}

int32_t kvp_cache_read(kvp_cache * cache, int32_t p0, int32_t p1, uint32_t n, int32_t * positions, float * keys,
                       float * values, kvp_error * err) {
    return guard(err, [&] {
        if (!cache) {
            fail(KVP_ERR_ARGUMENT, "kvp_cache_read: cache must not be NULL");
        }
        const token_rows tokens = cache->find_rows(p0, p1, n, positions, kvp_cache::from::host);
        if (n == 0) {
            return;
        }
        const uint32_t n_head = cache->shape.n_head_kv;
        // [n, n_head, d] of a layer -> [n_head, n, d] of the result
        const auto spread = [&](float * out, uint32_t d) {
            return [=](uint32_t il, const float * rows) {
                float * layer = out + size_t(il) * n_head * n * d;
                for (uint32_t i = 0; i < n; ++i) {
                    for (uint32_t h = 0; h < n_head; ++h) {
                        std::memcpy(layer + (size_t(h) * n + i) * d, rows + (size_t(i) * n_head + h) * d, d * sizeof(float));
                    }
                }
            };
        };
        if (keys) {
            cache->each_layer(tokens, false, spread(keys, cache->shape.head_size_k));
        }
        if (values) {
            cache->each_layer(tokens, true, spread(values, cache->shape.head_size_v));
        }
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
        const size_t n_head = cache->shape.n_head_kv;
        score_rows(
            *cache, p0, p1, n, positions, [&](const token_rows & tokens) { cache->place->score(scorer, tokens.order, scores); },
            [&](const token_rows & tokens) {
                cache->each_layer(tokens, false, [&](uint32_t il, const float * keys) {
                    score(keys, n, n_head, cache->shape.head_size_k, scores + il * n_head * n);
                });
            });
    });
}

int32_t kvp_cache_score_range(kvp_cache * cache, int32_t p0, int32_t p1, uint32_t n, float * scores, kvp_error * err) {
    return guard(err, [&] {
        if (!cache || !scores) {
            fail(KVP_ERR_ARGUMENT, "kvp_cache_score_range: cache and scores must not be NULL");
        }
        cache->place_of(p0, p1, n, [&](in_place & place, const std::vector<uint32_t> & cells) {
            place.score_range(cells, llama_n_threads(cache->ctx), scores);
        });
    });
}

int32_t kvp_cache_score_lag(kvp_cache * cache, int32_t p0, int32_t p1, uint32_t n, uint32_t first, uint32_t lag, uint32_t n_parts,
                            float * scores, kvp_error * err) {
    return guard(err, [&] {
        if (!cache || !scores) {
            fail(KVP_ERR_ARGUMENT, "kvp_cache_score_lag: cache and scores must not be NULL");
        }
        if (lag == 0 || n_parts < 2 || first > n || uint64_t(lag) * n_parts > n - first) {
            fail(KVP_ERR_ARGUMENT, "%u partitions of %u tokens from token %u on do not lie in %u tokens, or are not two", n_parts, lag, first, n);
        }
        cache->place_of(p0, p1, n, [&](in_place & place, const std::vector<uint32_t> & cells) {
            place.score_lag({ cells.begin() + first, cells.begin() + first + lag * n_parts }, lag, llama_n_threads(cache->ctx), scores);
        });
    });
}

int32_t kvp_cache_score_attention(kvp_cache * cache, int32_t p0, int32_t p1, uint32_t n, const kvp_query_batch * queries, const int32_t * held,
                                  float * paid, kvp_error * err) {
    return guard(err, [&] {
        if (!cache || !queries || !held || !paid || (queries->n > 0 && (!queries->queries || !queries->indices || !queries->scale))) {
            fail(KVP_ERR_ARGUMENT, "kvp_cache_score_attention: cache, queries, held and paid must not be NULL");
        }
        check_heads(*cache, queries->n_head);
        cache->place_of(p0, p1, n, [&](in_place & place, const std::vector<uint32_t> & cells) {
            place.score_attention(cells, *queries, held, llama_n_threads(cache->ctx), paid);
        });
    });
}

int32_t kvp_cache_score_expected(kvp_cache * cache, int32_t p0, int32_t p1, uint32_t n, const kvp_expected * expected, float * scores,
                                 kvp_error * err) {
    return guard(err, [&] {
        if (!cache || !expected || !scores || !expected->means || !expected->covariances || !expected->scale || !expected->left_out) {
            fail(KVP_ERR_ARGUMENT, "kvp_cache_score_expected: cache, expected and scores must not be NULL");
        }
        check_heads(*cache, expected->n_head);
        cache->place_of(p0, p1, n, [&](in_place & place, const std::vector<uint32_t> & cells) {
            place.score_expected(cells, *expected, llama_n_threads(cache->ctx), scores);
        });
    });
}

int32_t kvp_cache_score_policy(kvp_cache * cache, kvp_policy * policy, int32_t p0, int32_t p1, uint32_t n,
                               const int32_t * tokens, float * scores, kvp_error * err) {
    return guard(err, [&] {
        if (!cache || !policy || (n > 0 && (!tokens || !scores))) {
            fail(KVP_ERR_ARGUMENT, "kvp_cache_score_policy: cache, policy, tokens and scores must not be NULL");
        }
        const kvp_cache_shape &  c = cache->shape;
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
            [&](const token_rows & found) { cache->place->score(policy->network, slots, found.order, scores); },
            [&](const token_rows & found) {
                cache->each_layer(found, false, [&](uint32_t il, const float * keys) {
                    read_v(found.layers[il], found.v_trans, found.order, H * dv, c.v_hadamard_block, values.data());
                    policy->network.score(il, { keys, H * dk, dk }, { values.data(), H * dv, dv }, slots.data(), slots.size(), n,
                                          llama_n_threads(cache->ctx), scores + il * H * n);
                });
            });
    });
}

int32_t kvp_cache_remove(kvp_cache * cache, const int32_t * present, const uint8_t * keep, uint32_t n, uint32_t * n_ranges,
                         kvp_error * err) {
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
        for (uint32_t i = 0; i < n; ++i) {
            if (present[i] < 0 || (i > 0 && present[i] <= present[i - 1])) {
                fail(KVP_ERR_ARGUMENT, "present positions must ascend, but entry %u is %d", i, present[i]);
            }
        }
        const int32_t newest = llama_memory_seq_pos_max(cache->mem, SEQ_CHAT);
        if (present[n - 1] != newest) {
            fail(KVP_ERR_ARGUMENT, "the newest token is at position %d, not %d: the table of kept tokens is out of date", newest,
                 present[n - 1]);
        }
        if (!keep[n - 1]) {
            fail(KVP_ERR_ARGUMENT, "the newest token (position %d) cannot be removed: llama.cpp continues from it", newest);
        }
        // Positions between two present ones hold nothing, so a range may run across them: one call
        // per run of removed entries, and no fewer calls can leave the kept entries between the runs.
        for (uint32_t i = 0; i < n;) {
            if (keep[i]) {
                ++i;
                continue;
            }
            uint32_t end = i;
            while (!keep[end]) {
                ++end; // stops: keep[n - 1] is set
            }
            cache->remove(present[i], present[end - 1] + 1);
            if (n_ranges) {
                ++*n_ranges;
            }
            i = end;
        }
    });
}

int32_t kvp_cache_move(kvp_cache * cache, const int32_t * present, const int32_t * positions, uint32_t n, kvp_error * err) {
    return guard(err, [&] {
        if (!cache || (n > 0 && (!present || !positions))) {
            fail(KVP_ERR_ARGUMENT, "kvp_cache_move: cache, present and positions must not be NULL");
        }
        for (uint32_t i = 0; i < n; ++i) {
            if (positions[i] < 0 || positions[i] > present[i] ||
                (i > 0 && (present[i] <= present[i - 1] || positions[i] <= positions[i - 1]))) {
                fail(KVP_ERR_ARGUMENT, "cells move down and keep their order, but entry %u goes from %d to %d", i, present[i],
                     positions[i]);
            }
        }
        cache->move(present, positions, n);
    });
}

int32_t kvp_cache_appended(kvp_cache * cache, int32_t first, uint32_t n, kvp_error * err) {
    return guard(err, [&] {
        if (!cache || first < 0) {
            fail(KVP_ERR_ARGUMENT, "kvp_cache_appended: there is no cache, or position %d", first);
        }
        if (cache->place) {
            cache->place->cells.append(first, n, cache->watch->take(n));
        }
    });
}

void kvp_cache_forget(kvp_cache * cache) {
    if (cache && cache->place) {
        cache->place->cells.clear();
    }
}

void kvp_cache_get_location(const kvp_cache * cache, kvp_cache_location * place) {
    if (cache && place) {
        *place           = {};
        place->known     = cache->place.has_value();
        place->on_device = cache->place && !cache->place->on_host();
        place->can_pack  = cache->place && cache->place->can_pack();
        place->packed_in_place = cache->packed;
        place->packed_as_state = cache->packed_as_state;
        place->bytes_transferred   = cache->bytes_transferred + (cache->place ? cache->place->bytes_transferred() : 0);
        std::snprintf(place->where, sizeof(place->where), "%s", cache->place ? cache->place->devices().c_str() : cache->why_not.c_str());
    }
}

int32_t kvp_cache_check_cells(kvp_cache * cache, const int32_t * present, uint32_t n, uint32_t * known, kvp_error * err) {
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

int32_t kvp_cache_pack(kvp_cache * cache, const int32_t * present, uint32_t n, const int32_t * keep, const int32_t * positions,
                       uint32_t n_keep, const kvp_rope_shift * shift, kvp_error * err) {
    return guard(err, [&] {
        if (!cache || !present || !keep || !positions) {
            fail(KVP_ERR_ARGUMENT, "kvp_cache_pack: cache, present, keep and positions must not be NULL");
        }
        const kvp_cache_shape & s = cache->shape;
        cache->pack({ s.n_layer, s.n_head_kv, n, n_keep, present, keep, positions, shift_of(shift, s.k_hadamard_block) });
    });
}

int32_t kvp_cache_restore(kvp_cache * cache, const uint8_t * blob, size_t size, const int32_t * present, uint32_t n,
                          kvp_error * err) {
    return guard(err, [&] {
        if (!cache || !blob || !present) {
            fail(KVP_ERR_ARGUMENT, "kvp_cache_restore: cache, blob and present must not be NULL");
        }
        cache->restore(blob, size, present, n);
    });
}

int32_t kvp_cache_check_state(const kvp_cache * cache, const uint8_t * blob, size_t size, const int32_t * present, uint32_t n,
                              kvp_error * err) {
    return guard(err, [&] {
        if (!cache || !blob || !present) {
            fail(KVP_ERR_ARGUMENT, "kvp_cache_check_state: cache, blob and present must not be NULL");
        }
        cache->check_state(blob, size, present, n);
    });
}

int32_t kvp_state_pack(uint8_t * blob, size_t size, int32_t seq_id, uint32_t n_layer, uint32_t n_head_kv,
                       const int32_t * present, uint32_t n, const int32_t * keep, const int32_t * positions, uint32_t n_keep,
                       const kvp_rope_shift * shift, uint32_t rotation, size_t * packed_size, kvp_error * err) {
    return guard(err, [&] {
        if (!blob || !present || !keep || !positions || !packed_size) {
            fail(KVP_ERR_ARGUMENT, "kvp_state_pack: blob, present, keep, positions and packed_size must not be NULL");
        }
        *packed_size = pack_state(blob, size, seq_id,
                                  { n_layer, n_head_kv, n, n_keep, present, keep, positions, shift_of(shift, rotation) });
    });
}

} // extern "C"
