// Filling a cache as a state of llama.cpp's: a new blob is composed of the present one and a KV log.
#pragma once

#include "state/fill_plan.h"

#include <cstddef>
#include <cstdint>
#include <memory>

namespace kvp {

struct new_state {
    std::unique_ptr<uint8_t[]> bytes;
    size_t                     size = 0;
};

// `blob` is the state of now. A window cache loses what is behind the newest new position, and is copied otherwise.
// Throws kvp::error where the plan does not fit the blob.
new_state fill_state(const uint8_t * blob, size_t size, int32_t seq_id, const fill_plan & plan, fill_sources & sources);

} // namespace kvp
