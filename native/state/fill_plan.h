// What filling does: every (layer, KV head) takes its new rows from those present and from a KV log, in the same cells.
// It is sound for the reason that packing is (pack_plan.h).
#pragma once

#include "kvp_edge.h"
#include "state/kv_log.h"
#include "state/rope_shift.h"

#include <cstdint>
#include <vector>

namespace kvp {

struct fill_plan {
    const kvp_cache_shape &    cache;
    const kvp_log_layout &     log;
    const kvp_log_block *      blocks   = nullptr; // [n_blocks]
    uint32_t                   n_blocks = 0;
    uint32_t                   n        = 0; // rows present
    uint32_t                   n_new    = 0;
    const kvp_llama_position * present   = nullptr; // [n], ascending
    const int32_t *            source    = nullptr; // [n_layer, n_head_kv, n_new]: a row, or -1 - the index of a logged token
    const kvp_llama_position * positions = nullptr; // [n_new], ascending
    rope_shift                 shift;               // of keys, with a distance for every new row
};

// Keys or values of one head in one row: values that follow one another, or `step` bytes apart where V is transposed.
struct slice_at {
    const uint8_t * at;
    size_t          step;
};

class fill_sources {
public:
    // Throws unless rows, log and positions are possible ones. The plan must outlive it.
    explicit fill_sources(const fill_plan & plan);

    // The slices that the heads of layer il take, [n_head_kv, n_new], in the cache's type. `layer` holds the present rows
    // in `cells`. Valid until the next call. Throws nothing.
    const std::vector<slice_at> & slices(side s, uint32_t il, const layer_rows & layer, const std::vector<kvp_cell_index> & cells);

private:
    const fill_plan &     plan;
    logged_rows           logged;
    std::vector<slice_at> found;
    std::vector<uint8_t>  converted; // slices of logged rows of other types, of one layer
    std::vector<float>    values;
    std::vector<uint8_t>  aligned;
};

} // namespace kvp
