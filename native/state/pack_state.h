// Packing a state blob of llama.cpp's in memory.
#pragma once

#include "state/pack_plan.h"

#include <cstddef>
#include <cstdint>

namespace kvp {

// Rewrites the blob in place and returns its new size. Nothing is written before the whole blob and the
// whole plan have been checked; throws kvp::error otherwise. A window cache behind the base cache is
// moved up as it is.
size_t pack_state(uint8_t * blob, size_t size, int32_t seq_id, const pack_plan & plan);

} // namespace kvp
