#include "scorers.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace kvp {

namespace {

double dot(const float * a, const float * b, size_t n) {
    double sum = 0.0;
    for (size_t i = 0; i < n; ++i) {
        sum += (double) a[i] * b[i];
    }
    return sum;
}

double norm(const float * a, size_t n) { return std::sqrt(dot(a, a, n)); }

// A zero key has no direction; torch's normalize and cosine_similarity use floors like this one.
constexpr double TINY = 1e-12;

} // namespace

void score_knorm(const float * keys, size_t n, size_t n_head, size_t head_size, float * scores) {
    for (size_t i = 0; i < n; ++i) {
        for (size_t h = 0; h < n_head; ++h) {
            scores[h * n + i] = (float) -norm(keys + (i * n_head + h) * head_size, head_size);
        }
    }
}

void score_keydiff(const float * keys, size_t n, size_t n_head, size_t head_size, float * scores) {
    std::vector<float>  anchor(n_head * head_size);
    std::vector<double> sum(n_head * head_size, 0.0);
    for (size_t i = 0; i < n; ++i) {
        for (size_t h = 0; h < n_head; ++h) {
            const float * k     = keys + (i * n_head + h) * head_size;
            const double  scale = 1.0 / std::max(norm(k, head_size), TINY);
            for (size_t d = 0; d < head_size; ++d) {
                sum[h * head_size + d] += k[d] * scale;
            }
        }
    }
    for (size_t d = 0; d < anchor.size(); ++d) {
        anchor[d] = (float) (sum[d] / (double) n);
    }
    for (size_t h = 0; h < n_head; ++h) {
        const float * a      = anchor.data() + h * head_size;
        const double  a_norm = norm(a, head_size);
        for (size_t i = 0; i < n; ++i) {
            const float * k   = keys + (i * n_head + h) * head_size;
            scores[h * n + i] = (float) (-dot(k, a, head_size) / std::max(norm(k, head_size) * a_norm, TINY));
        }
    }
}

} // namespace kvp
