#include "rank.h"

#include "error.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>

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

namespace {

// Unsigned integers that sort like floats: flip the sign bit of positive ones, all bits of negative ones.
uint32_t sortable(float x) {
    if (!std::isfinite(x)) {
        return 0;
    }
    x += 0.0f; // -0 is 0
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

} // namespace

void choose_rows(const float * scores, const int32_t * unit, const uint8_t * is_protected, size_t n, size_t n_keep, int32_t * keep) {
    struct span {
        uint32_t start, size;
    };
    std::vector<span>     units;
    std::vector<uint64_t> order; // score of a unit, then its index: larger = first to stay
    std::vector<uint8_t>  stays(n, 0);
    size_t                room = n_keep;

    for (size_t start = 0; start < n;) {
        size_t end = start, n_protected = 0;
        double sum = 0.0;
        for (; end < n && unit[end] == unit[start]; ++end) {
            sum += scores[end];
            n_protected += is_protected[end] != 0;
        }
        if (end < n && unit[end] < unit[start]) {
            fail(KVP_ERR_ARGUMENT, "units must ascend, but %d follows %d", unit[end], unit[start]);
        }
        if (n_protected > 0) {
            if (end - start > room) {
                fail(KVP_ERR_ARGUMENT, "more rows are protected than the %zu that stay", n_keep);
            }
            room -= end - start;
            std::fill(stays.begin() + start, stays.begin() + end, uint8_t(1));
        } else {
            order.push_back(uint64_t(sortable(float(sum / double(end - start)))) << 32 | units.size());
        }
        units.push_back({ uint32_t(start), uint32_t(end - start) });
        start = end;
    }

    // Halving finds the units that all fit without sorting them: whatever better half fits is taken, else
    // the search goes on inside it.
    const auto best_first = std::greater<uint64_t>();
    const auto stay       = [&](uint64_t entry) {
        const span & u = units[uint32_t(entry)];
        std::fill_n(stays.begin() + u.start, u.size, uint8_t(1));
        room -= u.size;
    };
    auto lo = order.begin(), hi = order.end();
    while (hi - lo > 16) {
        const auto mid = lo + (hi - lo) / 2;
        std::nth_element(lo, mid, hi, best_first);
        size_t size = 0;
        for (auto entry = lo; entry != mid; ++entry) {
            size += units[uint32_t(*entry)].size;
        }
        if (size <= room) {
            std::for_each(lo, mid, stay);
            lo = mid;
        } else {
            hi = mid;
        }
    }
    // Where the first does not fit, smaller ones behind it still may: one by one, best first.
    const auto stay_if_it_fits = [&](uint64_t entry) {
        if (units[uint32_t(entry)].size <= room) {
            stay(entry);
        }
    };
    std::sort(lo, hi, best_first);
    std::for_each(lo, hi, stay_if_it_fits);
    if (room > 0) {
        std::sort(hi, order.end(), best_first);
        std::for_each(hi, order.end(), stay_if_it_fits);
    }
    // Only units larger than the room are left: the best of them is cut, its newest rows stay.
    for (auto entry = lo; room > 0 && entry != order.end(); ++entry) {
        const span & u = units[uint32_t(*entry)];
        for (uint32_t i = u.start + u.size; room > 0 && i-- > u.start;) {
            room -= stays[i] == 0;
            stays[i] = 1;
        }
    }
    if (room > 0) {
        fail(KVP_ERR_ARGUMENT, "%zu rows cannot be kept of %zu", n_keep, n);
    }
    for (size_t i = 0, k = 0; i < n; ++i) {
        if (stays[i]) {
            keep[k++] = int32_t(i);
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

extern "C" int32_t kvp_choose_rows(const float * scores, const int32_t * unit, const uint8_t * is_protected, uint32_t n_head, uint32_t n,
                 uint32_t n_keep, int32_t * keep, kvp_error * err) {
    return kvp::guard(err, [&] {
        if (!scores || !unit || !is_protected || !keep) {
            kvp::fail(KVP_ERR_ARGUMENT, "kvp_choose_rows: scores, unit, is_protected and keep must not be NULL");
        }
        for (size_t h = 0; h < n_head; ++h) {
            kvp::choose_rows(scores + h * n, unit + h * n, is_protected + h * n, n, n_keep, keep + h * n_keep);
        }
    });
}
