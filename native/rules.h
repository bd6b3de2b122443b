// The rules by which tokens are scored: the table in rules.cpp has one row for each kind in kvp_edge.h. To add one:
// its kind and parameters there, a row here, and graphs (rule_graphs.h) or a loop over rows, or both.
#pragma once

#include "cache.h"
#include "kvp_edge.h"
#include "rule_graphs.h"

#include <cstdint>

namespace kvp {

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

} // namespace kvp
