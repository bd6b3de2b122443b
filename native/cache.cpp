// kvp_cache: the C interface to one context's KV cache.
#include "cache.h"

#include "error.h"

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
