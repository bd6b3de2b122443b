// kvp_cache: the C interface to one context's KV cache.
#include "cache/cache.h"
#include "error.h"
#include "state/pack_state.h"

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

int32_t kvp_cache_log_layout(const kvp_cache * cache, int32_t type, kvp_log_layout * layout, kvp_error * err) {
    return guard(err, [&] {
        if (!cache || !layout) {
            fail(KVP_ERR_ARGUMENT, "kvp_cache_log_layout: cache and layout must not be NULL");
        }
        *layout = log_layout_of(cache->shape(), type);
    });
}

int32_t kvp_cache_log_rows(kvp_cache * cache, const kvp_log_layout * layout, kvp_llama_position p0, kvp_llama_position p1,
                           uint32_t n, uint8_t * rows, kvp_error * err) {
    return guard(err, [&] {
        if (!cache || !layout || (n > 0 && !rows)) {
            fail(KVP_ERR_ARGUMENT, "kvp_cache_log_rows: cache, layout and rows must not be NULL");
        }
        cache->log_rows(*layout, p0, p1, n, rows);
    });
}

int32_t kvp_cache_fill(kvp_cache * cache, const kvp_llama_position * present, uint32_t n, const kvp_log_layout * layout,
                       const kvp_log_block * blocks, uint32_t n_blocks, const int32_t * source,
                       const kvp_llama_position * positions, uint32_t n_new, const kvp_rope_shift * shift, kvp_error * err) {
    return guard(err, [&] {
        if (!cache || !layout || !source || !positions || (n > 0 && !present) || (n_blocks > 0 && !blocks)) {
            fail(KVP_ERR_ARGUMENT, "kvp_cache_fill: cache, present, layout, blocks, source and positions must not be NULL");
        }
        const kvp_cache_shape & s = cache->shape();
        cache->fill({ s, *layout, blocks, n_blocks, n, n_new, present, source, positions, shift_of(shift, s.k_hadamard_block) });
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
