// IEEE half to single.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace kvp {

// Exact; `src` may be any address. Without branches or subnormal arithmetic, so that compilers vectorise it, for the
// processor that the function it is inlined into is compiled for. ggml's conversion through the type traits is a
// scalar one that took most of a scoring pass.
inline __attribute__((always_inline)) void half_to_float(const uint8_t * __restrict src, float * __restrict out, size_t n) {
    constexpr uint32_t BIAS = (127 - 15) << 23; // between the two formats' exponents
    for (size_t i = 0; i < n; ++i) {
        uint16_t h;
        std::memcpy(&h, src + i * sizeof(h), sizeof(h));
        const uint32_t magnitude = (h & 0x7fffu) << 13;
        const uint32_t normal    = magnitude + BIAS + (magnitude >= 0x0f800000u ? BIAS : 0u); // infinity, NaN
        // a subnormal is its fraction times 2^-14: give it that exponent, then take away the hidden one
        const uint32_t with_one = magnitude + BIAS + (1u << 23);
        float          value;
        std::memcpy(&value, &with_one, sizeof(value));
        value -= 0x1p-14f;
        uint32_t subnormal;
        std::memcpy(&subnormal, &value, sizeof(subnormal));
        const uint32_t bits = (magnitude < (1u << 23) ? subnormal : normal) | (h & 0x8000u) << 16;
        std::memcpy(&out[i], &bits, sizeof(bits));
    }
}

} // namespace kvp
