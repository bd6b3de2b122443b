#include "rank.h"

#include "error.h"

#include <algorithm>
#include <cmath>

namespace kvp {

std::vector<double> token_scores(const float * scores, size_t n_head, size_t n, const uint8_t * competes) {
    std::vector<double> result(n, 0.0);
    for (size_t h = 0; h < n_head; ++h) {
        const float * s       = scores + h * n;
        double        sum     = 0.0;
        double        lowest  = 0.0;
        size_t        n_valid = 0;
        for (size_t i = 0; i < n; ++i) {
            if (competes[i] && std::isfinite(s[i])) {
                sum += s[i];
                lowest = n_valid == 0 ? s[i] : std::min(lowest, (double) s[i]);
                ++n_valid;
            }
        }
        if (n_valid == 0) {
            continue;
        }
        const double mean    = sum / (double) n_valid;
        double       squares = 0.0;
        for (size_t i = 0; i < n; ++i) {
            if (competes[i] && std::isfinite(s[i])) {
                squares += (s[i] - mean) * (s[i] - mean);
            }
        }
        const double spread = std::sqrt(squares / (double) n_valid);
        for (size_t i = 0; i < n; ++i) {
            if (!competes[i]) {
                continue;
            }
            if (!std::isfinite(s[i])) {
                result[i] += spread > 0.0 ? (lowest - mean) / spread - 1.0 : -1.0;
            } else if (spread > 0.0) {
                result[i] += (s[i] - mean) / spread;
            }
        }
    }
    for (double & r : result) {
        r /= (double) std::max<size_t>(n_head, 1);
    }
    return result;
}

void choose_tokens(const double * scores, const int32_t * unit, const uint8_t * is_protected, size_t n, size_t budget,
                   uint8_t * keep) {
    struct run {
        size_t start, size;
        double score; // mean over its tokens
    };
    std::vector<run> competing;
    size_t           n_kept = 0;

    std::fill(keep, keep + n, uint8_t(0));
    for (size_t start = 0; start < n;) {
        size_t end   = start;
        double sum   = 0.0;
        bool   fixed = false;
        for (; end < n && unit[end] == unit[start]; ++end) {
            sum += scores[end];
            fixed |= is_protected[end] != 0;
        }
        if (fixed) {
            std::fill(keep + start, keep + end, uint8_t(1));
            n_kept += end - start;
        } else {
            competing.push_back({ start, end - start, sum / (double) (end - start) });
        }
        start = end;
    }
    std::sort(competing.begin(), competing.end(), [](const run & a, const run & b) {
        return a.score != b.score ? a.score > b.score : a.start > b.start;
    });
    for (const run & r : competing) { // a unit too large for what is left may leave room for smaller ones
        if (n_kept >= budget) {
            break;
        }
        if (r.size <= budget - n_kept) {
            std::fill(keep + r.start, keep + r.start + r.size, uint8_t(1));
            n_kept += r.size;
        }
    }
}

} // namespace kvp

extern "C" int32_t kvp_choose_tokens(const float * scores, uint32_t n_head, const int32_t * unit, const uint8_t * is_protected,
                                     uint32_t n, uint32_t budget, uint8_t * keep, kvp_error * err) {
    return kvp::guard(err, [&] {
        if (n > 0 && (!scores || !unit || !is_protected || !keep)) {
            kvp::fail(KVP_ERR_ARGUMENT, "kvp_choose_tokens: no array may be NULL");
        }
        std::vector<uint8_t> competes(n);
        std::transform(is_protected, is_protected + n, competes.begin(), [](uint8_t p) { return uint8_t(p == 0); });
        const std::vector<double> mean = kvp::token_scores(scores, n_head, n, competes.data());
        kvp::choose_tokens(mean.data(), unit, is_protected, n, budget, keep);
    });
}
