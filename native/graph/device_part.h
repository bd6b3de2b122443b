// The layers of a cache that lie on one device.
#pragma once

#include "graph/device.h"
#include "graph/policy.h"
#include "graph/tensor_space.h"

#include "ggml.h"

#include <cstdint>
#include <memory>
#include <vector>

namespace kvp {

constexpr size_t WORD_BYTES = sizeof(float);

// One layer's tensors in a device's memory.
struct device_layer {
    uint32_t            il; // in the base cache
    const ggml_tensor * k;
    const ggml_tensor * v;
    ggml_tensor *       k_words; // the same memory as words of 32 bits, f32 [row / 4, cells], so that rows are
    ggml_tensor *       v_words; // moved bit by bit, whatever their type; null if rows are no whole words
};

// The layers that lie on one device.
struct device_part {
    std::unique_ptr<device>        on;
    std::vector<device_layer>      layers;
    tensor_space                   words;
    std::unique_ptr<device_policy> policy; // the one that was used last
};

} // namespace kvp
