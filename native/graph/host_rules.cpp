#include "graph/host_rules.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace kvp {

namespace {

// Partial sums in eight lanes, which compilers turn into vector code without being allowed to reorder.
float dot(const float * a, const float * b, size_t n) {
    float  lane[8] = {};
    size_t i       = 0;
    for (; i + 8 <= n; i += 8) {
        for (size_t j = 0; j < 8; ++j) {
            lane[j] += a[i + j] * b[i + j];
        }
    }
    for (; i < n; ++i) {
        lane[0] += a[i] * b[i];
    }
    return ((lane[0] + lane[4]) + (lane[1] + lane[5])) + ((lane[2] + lane[6]) + (lane[3] + lane[7]));
}

float norm(const float * a, size_t n) { return std::sqrt(dot(a, a, n)); }

// A zero key has no direction; torch's normalize and cosine_similarity use floors like this one.
constexpr float TINY = 1e-12f;

} // namespace

void score_knorm(const float * keys, size_t n, size_t n_head, size_t head_size, float * scores) {
    for (size_t i = 0; i < n; ++i) {
        for (size_t h = 0; h < n_head; ++h) {
            scores[h * n + i] = -norm(keys + (i * n_head + h) * head_size, head_size);
        }
    }
}

void score_keydiff(const float * keys, size_t n, size_t n_head, size_t head_size, float * scores) {
    std::vector<float>  inverse_norm(n);
    std::vector<double> sum(head_size);
    std::vector<float>  anchor(head_size);
    for (size_t h = 0; h < n_head; ++h) {
        const auto key = [&](size_t i) { return keys + (i * n_head + h) * head_size; };
        std::fill(sum.begin(), sum.end(), 0.0);
        for (size_t i = 0; i < n; ++i) {
            const float * k = key(i);
            inverse_norm[i] = 1.0f / std::max(norm(k, head_size), TINY);
            for (size_t d = 0; d < head_size; ++d) {
                sum[d] += k[d] * inverse_norm[i];
            }
        }
        for (size_t d = 0; d < head_size; ++d) {
            anchor[d] = (float) (sum[d] / (double) n);
        }
        const float anchor_scale = 1.0f / std::max(norm(anchor.data(), head_size), TINY);
        for (size_t i = 0; i < n; ++i) {
            scores[h * n + i] = -dot(key(i), anchor.data(), head_size) * inverse_norm[i] * anchor_scale;
        }
    }
}

} // namespace kvp
