// Vectors of floats in the language that GCC and Clang share: `lanes` of them at once, whatever the processor.
//
// A function that uses more lanes than the whole library is compiled for carries the attribute `target`, and all it
// calls here is inlined into it. So vectors pass by reference: as values they would have another way to be passed
// in every target.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#define KVP_INLINE inline __attribute__((always_inline))

namespace kvp {

template <size_t n> struct lanes {
    typedef float    floats __attribute__((vector_size(n * sizeof(float))));
    typedef uint32_t words __attribute__((vector_size(n * sizeof(float))));
    static constexpr size_t count = n;

    static KVP_INLINE void load(floats & to, const float * from) { std::memcpy(&to, from, sizeof(to)); }
    static KVP_INLINE void store(float * to, const floats & from) { std::memcpy(to, &from, sizeof(from)); }
};

// x <- exp(x) for x <= 0, minus infinity included; 0 where the result is smaller than any normal number. Relative
// error below 2^-22. The polynomial is that of Cephes' expf (S. Moshier).
template <typename L> KVP_INLINE void exp_of_negative(typename L::floats & x) {
    using floats = typename L::floats;
    using words  = typename L::words;
    // x = power * ln 2 + rest. Added to MAGIC, a number below 2^22 loses its fraction and stands in the lowest bits.
    constexpr float MAGIC = 0x1.8p23f, LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;
    const floats    shifted = x * 1.44269504f + MAGIC;
    const floats    power   = shifted - MAGIC;
    const floats    rest    = (x - power * LN2_HIGH) - power * LN2_LOW;

    floats p = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    p        = p * rest + 8.3334519073e-3f;
    p        = p * rest + 4.1665795894e-2f;
    p        = p * rest + 1.6666665459e-1f;
    p        = p * rest + 5.0000001201e-1f;
    p        = p * rest * rest + rest + 1.0f;

    words bits, exponent;
    std::memcpy(&bits, &p, sizeof(bits));
    std::memcpy(&exponent, &shifted, sizeof(exponent));
    bits += exponent << 23;
    std::memcpy(&p, &bits, sizeof(p));
    x = x < -87.0f ? floats{} : p;
}

} // namespace kvp
