#include "state/pack_plan.h"

#include "error.h"

namespace kvp {

bool check_rows(const pack_plan & plan) {
    if (plan.n == 0 || plan.n_keep == 0 || plan.n_keep > plan.n || plan.n_head_kv == 0 || plan.n_layer == 0) {
        fail(KVP_ERR_ARGUMENT, "%u of %u rows in %u layers of %u KV heads cannot be packed", plan.n_keep, plan.n, plan.n_layer,
             plan.n_head_kv);
    }
    for (uint32_t i = 0; i < plan.n_keep; ++i) {
        if (plan.positions[i] < 0 || (i > 0 && plan.positions[i] <= plan.positions[i - 1])) {
            fail(KVP_ERR_ARGUMENT, "new positions must ascend from 0, but entry %u is %d", i, plan.positions[i]);
        }
    }

    bool                ascending = true;
    std::vector<size_t> last_use(plan.n, 0);
    const size_t        n_groups = size_t(plan.n_layer) * plan.n_head_kv; // may be more than 2^32
    for (size_t g = 0; g < n_groups; ++g) {
        for (uint32_t i = 0; i < plan.n_keep; ++i) {
            const int32_t * at  = plan.keep + g * plan.n_keep + i;
            const int32_t   row = *at;
            if (row < 0 || uint32_t(row) >= plan.n || last_use[row] == g + 1) {
                fail(KVP_ERR_ARGUMENT, "layer %zu, KV head %zu keeps row %d, which is %s", g / plan.n_head_kv, g % plan.n_head_kv,
                     row, row < 0 || uint32_t(row) >= plan.n ? "none of the cache's" : "named twice");
            }
            last_use[row] = g + 1;
            ascending     = ascending && (i == 0 || at[-1] < row);
        }
    }
    return ascending;
}

std::vector<uint32_t> surviving_rows(const pack_plan & plan) {
    std::vector<uint32_t> rows;
    for (uint32_t row = 0, i = 0; row < plan.n && i < plan.n_keep; ++row) {
        if (plan.present[row] == plan.positions[i]) {
            rows.push_back(row);
            ++i;
        }
    }
    return rows.size() == plan.n_keep ? rows : std::vector<uint32_t>();
}

row_range rows_to_move(const pack_plan & plan, const std::vector<uint32_t> & survivors) {
    row_range range{ plan.n_keep, 0 };
    const size_t n_groups = size_t(plan.n_layer) * plan.n_head_kv;
    for (size_t g = 0; g < n_groups; ++g) {
        const kvp_row * keep = plan.keep + g * plan.n_keep;
        for (uint32_t i = 0; i < range.first; ++i) {
            if (uint32_t(keep[i]) != survivors[i]) {
                range.first = i;
            }
        }
        for (uint32_t i = plan.n_keep; i > range.last; --i) {
            if (uint32_t(keep[i - 1]) != survivors[i - 1]) {
                range.last = i;
            }
        }
    }
    return range;
}

} // namespace kvp
