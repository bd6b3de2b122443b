#include "state/fill_plan.h"

#include "error.h"
#include "state/convert.h"

#include <algorithm>

namespace kvp {

namespace {

struct types {
    ggml_type cache, log;
    size_t    n_values; // of a head

    size_t in_cache() const { return ggml_row_size(cache, int64_t(n_values)); } // bytes of a head
    size_t in_log() const { return ggml_row_size(log, int64_t(n_values)); }
};

types types_of(const fill_plan & plan, side s) {
    return s == side::k ? types{ ggml_type(plan.cache.type_k), ggml_type(plan.log.type_k), plan.cache.head_size_k }
                        : types{ ggml_type(plan.cache.type_v), ggml_type(plan.log.type_v), plan.cache.head_size_v };
}

} // namespace

fill_sources::fill_sources(const fill_plan & plan) : plan(plan), logged(plan.log, plan.blocks, plan.n_blocks) {
    const size_t n_head = plan.cache.n_head_kv, n_new = plan.n_new, n_groups = plan.cache.n_layer * n_head;
    if (n_new == 0) {
        fail(KVP_ERR_ARGUMENT, "a cache cannot be filled with no rows at all");
    }
    for (uint32_t i = 0; i < n_new; ++i) {
        if (plan.positions[i] < 0 || (i > 0 && plan.positions[i] <= plan.positions[i - 1])) {
            fail(KVP_ERR_ARGUMENT, "new positions must ascend from 0, but entry %u is %d", i, plan.positions[i]);
        }
    }
    size_t                most = 0, in_layer = 0; // logged rows that heads of one layer take
    std::vector<uint32_t> last_use(plan.n + logged.size(), 0);
    for (size_t g = 0; g < n_groups; ++g) {
        in_layer = g % n_head ? in_layer : 0;
        for (size_t i = 0; i < n_new; ++i) {
            const int32_t source = plan.source[g * n_new + i];
            size_t        number = size_t(source);
            bool          known  = source >= 0 && uint32_t(source) < plan.n;
            if (source < 0) {
                const auto at = logged.find(-1 - source);
                known         = at.found;
                number        = plan.n + (known ? logged.number(at) : 0);
                ++in_layer;
            }
            if (!known || last_use[number] == g + 1) {
                fail(KVP_ERR_ARGUMENT, "layer %zu, KV head %zu takes %s %d, which is %s", g / n_head, g % n_head,
                     source < 0 ? "the logged row of token" : "row", source < 0 ? -1 - source : source,
                     known ? "named twice" : source < 0 ? "in none of the log's blocks" : "none of the cache's");
            }
            last_use[number] = uint32_t(g + 1);
        }
        most = std::max(most, in_layer);
    }

    // so that nothing can fail later, when the cache changes
    found.resize(n_head * n_new);
    size_t largest = 0, most_values = 0, most_bytes = 0;
    for (const side s : { side::k, side::v }) {
        const types t = types_of(plan, s);
        if (t.cache != t.log) {
            largest     = std::max(largest, t.in_cache());
            most_values = std::max(most_values, t.n_values);
            most_bytes  = std::max({ most_bytes, t.in_cache(), t.in_log() });
        }
    }
    converted.resize(most * largest);
    values.resize(most_values);
    aligned.reserve(most_bytes);
}

const std::vector<slice_at> & fill_sources::slices(side s, uint32_t il, const layer_rows & layer,
                                                   const std::vector<kvp_cell_index> & cells) {
    const types     t      = types_of(plan, s);
    const size_t    n_head = plan.cache.n_head_kv, n_new = plan.n_new, value = ggml_type_size(t.cache);
    const size_t    slice = t.in_cache(), row = slice * n_head;
    const bool      columns = s == side::v && plan.cache.v_transposed;
    const uint8_t * rows    = s == side::k ? layer.k : layer.v;
    uint8_t *       next    = converted.data();
    for (size_t h = 0; h < n_head; ++h) {
        const int32_t * source = plan.source + (il * n_head + h) * n_new;
        slice_at *      to     = found.data() + h * n_new;
        for (size_t i = 0; i < n_new; ++i) {
            if (source[i] >= 0) {
                const size_t cell = cells[size_t(source[i])];
                to[i] = columns ? slice_at{ rows + h * t.n_values * layer.v_column + cell * value, layer.v_column }
                                : slice_at{ rows + cell * row + h * slice, value };
                continue;
            }
            to[i] = { logged.row(logged.find(-1 - source[i]), il, s) + h * t.in_log(), value };
            if (t.cache != t.log) {
                to_float(t.log, to[i].at, t.n_values, values.data(), aligned);
                from_float(t.cache, values.data(), t.n_values, next, aligned);
                to[i].at = next;
                next += slice;
            }
        }
    }
    return found;
}

} // namespace kvp
