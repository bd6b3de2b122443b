#include "state/rope_shift.h"

#include "error.h"
#include "state/convert.h"
#include "state/rows.h"

#include <cmath>
#include <vector>

namespace kvp {

void check_shift(const rope_shift & how, ggml_type type, size_t row, size_t n_head) {
    if (!can_be_written(type)) {
        fail(KVP_ERR_UNSUPPORTED, "keys of type %s cannot be turned to new positions", ggml_type_name(type));
    }
    const int64_t head_size = int64_t(row / n_head / ggml_type_size(type)) * ggml_blck_size(type);
    if (!how.distance || how.n_pairs == 0 || 2 * int64_t(how.n_pairs) > head_size ||
        (how.hadamard_block && head_size % how.hadamard_block != 0)) {
        fail(KVP_ERR_ARGUMENT, "%u pairs cannot be turned in keys of %lld values", how.n_pairs, (long long) head_size);
    }
}

void shift_keys(const rope_shift & how, size_t il, ggml_type type, size_t row, size_t n_head, size_t n_keep, uint8_t * keys) {
    const double *            frequency = how.frequency + il * how.n_pairs;
    const kvp_rope_position * distance  = how.distance + il * n_head * n_keep;
    const size_t              slice     = row / n_head;
    const size_t              head_size = slice / ggml_type_size(type) * size_t(ggml_blck_size(type));
    std::vector<float>        k(head_size);
    std::vector<uint8_t>      aligned;
    for (size_t h = 0; h < n_head; ++h) {
        for (size_t i = 0; i < n_keep; ++i) {
            const int32_t by = distance[h * n_keep + i];
            if (by == 0) {
                continue;
            }
            uint8_t * at = keys + i * row + h * slice;
            to_float(type, at, head_size, k.data(), aligned);
            if (how.hadamard_block) {
                hadamard(k.data(), head_size, how.hadamard_block);
            }
            for (uint32_t p = 0; p < how.n_pairs; ++p) {
                float &      a     = k[how.neox ? p : 2 * p];
                float &      b     = k[how.neox ? p + how.n_pairs : 2 * p + 1];
                const double angle = by * frequency[p], cos = std::cos(angle), sin = std::sin(angle);
                const double a1 = a * cos - b * sin, b1 = a * sin + b * cos;
                a = float(a1);
                b = float(b1);
            }
            if (how.hadamard_block) {
                hadamard(k.data(), head_size, how.hadamard_block);
            }
            from_float(type, k.data(), head_size, at, aligned);
        }
    }
}

} // namespace kvp
