// Filling a cache as a state of llama.cpp's: a new blob is composed of the present one and a KV log.
#pragma once

#include "state/fill_plan.h"
#include "state/state_blob.h"

#include <cstddef>
#include <cstdint>
#include <memory>

namespace kvp {

struct new_state {
    std::unique_ptr<uint8_t[]> bytes;
    size_t                     size      = 0;
    size_t                     base_size = 0; // without a window cache
};

// `blob` is the state of now, whose window cache is copied. Throws kvp::error where the plan does not fit the blob.
new_state fill_state(const uint8_t * blob, size_t size, int32_t seq_id, const fill_plan & plan, fill_sources & sources);

// The same with the window cache of another state.
new_state with_window(const new_state & made, const state_blob & of);

} // namespace kvp
