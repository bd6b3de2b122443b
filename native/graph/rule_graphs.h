// Rules as ggml graphs over rows that stay where they lie: cell numbers go there, scores come back.
#pragma once

#include "graph/device_part.h"
#include "kvp_edge.h"

#include <cstdint>
#include <vector>

namespace kvp {

// Some tokens' rows in the layers of some devices.
struct rows_in_place {
    std::vector<device_part *>          parts;
    const kvp_cache_shape &             shape;
    const std::vector<kvp_cell_index> & cells;
};

// Each fills the scores of the layers that there are, as kvp_edge.h lays them out, and leaves others as they were.
// KVP_ERR_UNSUPPORTED, KVP_ERR_MEMORY: a device lacks an operation or memory.
void graphs_of_knorm(const rows_in_place & where, const kvp_rule & rule, float * scores);
void graphs_of_keydiff(const rows_in_place & where, const kvp_rule & rule, float * scores);
void graphs_of_range(const rows_in_place & where, const kvp_rule & rule, float * scores);
void graphs_of_lag(const rows_in_place & where, const kvp_rule & rule, float * scores);
void graphs_of_attention(const rows_in_place & where, const kvp_rule & rule, float * scores);
void graphs_of_expected(const rows_in_place & where, const kvp_rule & rule, float * scores);
void graphs_of_policy(const rows_in_place & where, const kvp_rule & rule, float * scores);

} // namespace kvp
