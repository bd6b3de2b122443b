#include "log/attention_kernel.h"

#include "log/lanes.h"
#include "state/half.h"

#include <array>
#include <limits>

namespace kvp {

namespace {

constexpr float LARGEST = std::numeric_limits<float>::max(), NOT_SEEN = -std::numeric_limits<float>::infinity();

// logits of `rows` keys and `vectors` * L::count columns. All sums stay in registers: rows * vectors of them.
template <typename L, size_t rows, size_t vectors>
KVP_INLINE void products(const float * keys, size_t head_size, const float * queries, size_t width, float * logits) {
    using floats = typename L::floats;
    floats sums[rows][vectors] = {};
    for (size_t k = 0; k < head_size; ++k) {
        floats query[vectors];
        for (size_t v = 0; v < vectors; ++v) {
            L::load(query[v], queries + k * width + v * L::count);
        }
        for (size_t i = 0; i < rows; ++i) {
            for (size_t v = 0; v < vectors; ++v) {
                sums[i][v] += query[v] * keys[i * head_size + k];
            }
        }
    }
    for (size_t i = 0; i < rows; ++i) {
        for (size_t v = 0; v < vectors; ++v) {
            const floats none = floats{} + NOT_SEEN, most = floats{} + LARGEST;
            floats       x = sums[i][v];
            x              = x >= NO_LOGIT ? x : none; // no number is not
            x              = x < LARGEST ? x : most;
            L::store(logits + i * width + v * L::count, x);
        }
    }
}

template <typename L, size_t rows, size_t vectors>
KVP_INLINE void products_of_all(const float * keys, size_t n, size_t head_size, const float * queries, size_t width, float * logits) {
    size_t i = 0;
    for (; i + rows <= n; i += rows) {
        products<L, rows, vectors>(keys + i * head_size, head_size, queries, width, logits + i * width);
    }
    for (; i < n; ++i) {
        products<L, 1, vectors>(keys + i * head_size, head_size, queries, width, logits + i * width);
    }
}

// Columns from number c on: as many at once as there are vectors for, and the rest in one go, too.
template <typename L, size_t rows, size_t vectors>
KVP_INLINE void products_of_columns(const float * keys, size_t n, size_t head_size, const float * queries, size_t c, size_t width,
                                    float * logits) {
    for (; c + vectors * L::count <= width; c += vectors * L::count) {
        products_of_all<L, rows, vectors>(keys, n, head_size, queries + c, width, logits + c);
    }
    if constexpr (vectors > 1) {
        products_of_columns<L, rows, vectors - 1>(keys, n, head_size, queries, c, width, logits);
    }
}

template <typename L, size_t rows, size_t vectors>
KVP_INLINE void weigh(const float * keys, size_t n, size_t head_size, const float * queries, size_t width, const int32_t * last,
                      int32_t first, float * logits, float * weights, float * largest, float * sum) {
    using floats = typename L::floats;
    products_of_columns<L, rows, vectors>(keys, n, head_size, queries, 0, width, logits);
    if (last) {
        for (size_t i = 0; i < n; ++i) {
            for (size_t c = 0; c < width; ++c) {
                logits[i * width + c] = last[c] < first + int32_t(i) ? NOT_SEEN : logits[i * width + c];
            }
        }
    }
    for (size_t c = 0; c < width; c += L::count) {
        floats before, most, total, x;
        L::load(before, largest + c);
        most = before;
        for (size_t i = 0; i < n; ++i) {
            L::load(x, logits + i * width + c);
            most = x > most ? x : most;
        }
        L::store(largest + c, most);
        before -= most;
        exp_of_negative<L>(before);
        L::load(total, sum + c);
        total *= before;
        L::store(sum + c, total);
    }
    for (size_t i = 0; i < n; ++i) { // row by row: weights go to memory that is in no cache
        for (size_t c = 0; c < width; c += L::count) {
            floats x, y;
            L::load(x, logits + i * width + c);
            L::load(y, largest + c);
            x -= y;
            exp_of_negative<L>(x);
            L::store(weights + i * width + c, x);
            L::load(y, sum + c);
            y += x;
            L::store(sum + c, y);
        }
    }
}

template <typename L>
KVP_INLINE void reduce(const float * weights, size_t n, size_t width, const float * top, const float * share, float * factor,
                       float * largest, float * sum) {
    using floats = typename L::floats;
    for (size_t c = 0; c < width; c += L::count) {
        floats x, y;
        L::load(x, factor + c);
        L::load(y, top + c);
        x -= y;
        exp_of_negative<L>(x);
        L::load(y, share + c);
        x *= y;
        L::store(factor + c, x);
    }
    for (size_t i = 0; i < n; ++i) {
        floats most = {}, total = {};
        for (size_t c = 0; c < width; c += L::count) {
            floats x, f;
            L::load(x, weights + i * width + c);
            L::load(f, factor + c);
            x *= f;
            most = x > most ? x : most;
            total += x;
        }
        float m = largest[i], s = 0;
        for (size_t lane = 0; lane < L::count; ++lane) {
            m = most[lane] > m ? most[lane] : m;
            s += total[lane];
        }
        largest[i] = m;
        sum[i] += s;
    }
}

// One kernel: lanes, keys and vectors of columns multiplied at once, and what the processor must have.
#define KVP_KERNEL(name, n_lanes, rows, vectors, target)                                                                          \
    target void from_halves_##name(const uint8_t * halves, size_t n, float * out) { half_to_float(halves, out, n); }              \
    target void weigh_##name(const float * keys, size_t n, size_t head_size, const float * queries, size_t width,                \
                             const int32_t * last, int32_t first, float * logits, float * weights, float * largest, float * sum) { \
        weigh<lanes<n_lanes>, rows, vectors>(keys, n, head_size, queries, width, last, first, logits, weights, largest, sum);     \
    }                                                                                                                             \
    target void reduce_##name(const float * weights, size_t n, size_t width, const float * top, const float * share,             \
                              float * factor, float * largest, float * sum) {                                                    \
        reduce<lanes<n_lanes>>(weights, n, width, top, share, factor, largest, sum);                                              \
    }                                                                                                                             \
    constexpr attention_kernel KERNEL_##name = { #name, from_halves_##name, weigh_##name, reduce_##name };

KVP_KERNEL(baseline, 4, 6, 2, )
#if defined(__x86_64__)
KVP_KERNEL(avx2, 8, 6, 2, __attribute__((target("avx2,fma"))))
KVP_KERNEL(avx512, 16, 6, 4, __attribute__((target("avx512f"))))
#endif

} // namespace

const attention_kernel * const * attention_kernels() {
    static const auto all = [] {
        std::array<const attention_kernel *, 4> found = {};
        size_t                                  n     = 0;
#if defined(__x86_64__)
        if (__builtin_cpu_supports("avx512f")) {
            found[n++] = &KERNEL_avx512;
        }
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
            found[n++] = &KERNEL_avx2;
        }
#endif
        found[n] = &KERNEL_baseline;
        return found;
    }();
    return all.data();
}

} // namespace kvp
