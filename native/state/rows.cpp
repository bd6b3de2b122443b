#include "state/rows.h"

#include "error.h"
#include "state/half.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

namespace kvp {

hadamard_blocks hadamard_blocks_of(ggml_type type_k, ggml_type type_v, uint32_t head_size_k, uint32_t head_size_v) {
    const char * disable = std::getenv("LLAMA_ATTN_ROT_DISABLE");
    hadamard_blocks blocks;
    if (disable && std::atoi(disable) != 0) {
        return blocks;
    }
    if (ggml_is_quantized(type_k) && head_size_k % 64 == 0) {
        blocks.k = 64;
        while (head_size_k % (2 * blocks.k) == 0) {
            blocks.k *= 2;
        }
    }
    if (ggml_is_quantized(type_v) && head_size_v % 64 == 0) {
        blocks.v = 64;
    }
    return blocks;
}

void hadamard(float * y, size_t n, uint32_t block) {
    const float scale = 1.0f / std::sqrt((float) block);
    for (float * b = y; b < y + n; b += block) {
        for (uint32_t half = 1; half < block; half *= 2) {
            for (uint32_t i = 0; i < block; i += 2 * half) {
                for (uint32_t j = i; j < i + half; ++j) {
                    const float lo = b[j], hi = b[j + half];
                    b[j]        = lo + hi;
                    b[j + half] = lo - hi;
                }
            }
        }
        for (uint32_t j = 0; j < block; ++j) {
            b[j] *= scale;
        }
    }
}

namespace {

// A converter of rows of n_values values of any ggml type to f32. Source rows may be unaligned (blobs
// are packed), so each passes through an aligned buffer.
class row_reader {
public:
    row_reader(const char * side, ggml_type type, size_t row_bytes, size_t n_values)
        : type(type), n_values(n_values), aligned(row_bytes) {
        if (n_values % ggml_blck_size(type) != 0 || row_bytes != ggml_row_size(type, (int64_t) n_values)) {
            fail(KVP_ERR_LAYOUT, "a row of %s has %zu bytes, which %zu values of type %s do not make", side, row_bytes,
                 n_values, ggml_type_name(type));
        }
        convert = ggml_get_type_traits(type)->to_float;
        if (!convert && type != GGML_TYPE_F32) {
            fail(KVP_ERR_UNSUPPORTED, "a cache of type %s cannot be read back", ggml_type_name(type));
        }
    }

    void read(const uint8_t * src, float * out) {
        if (type == GGML_TYPE_F32) {
            std::memcpy(out, src, aligned.size());
        } else {
            std::memcpy(aligned.data(), src, aligned.size());
            if (type == GGML_TYPE_F16) {
                half_to_float(aligned.data(), out, n_values);
            } else {
                convert(aligned.data(), out, (int64_t) n_values);
            }
        }
    }

private:
    ggml_type            type;
    size_t               n_values;
    std::vector<uint8_t> aligned;
    ggml_to_float_t      convert = nullptr;
};

} // namespace

void read_k(const layer_rows & layer, const std::vector<uint32_t> & order, size_t n_values, uint32_t hadamard_block, float * out) {
    row_reader row("K", layer.type_k, layer.k_row, n_values);
    for (size_t i = 0; i < order.size(); ++i) {
        row.read(layer.k + order[i] * layer.k_row, out + i * n_values);
    }
    if (hadamard_block) {
        hadamard(out, order.size() * n_values, hadamard_block);
    }
}

void read_v(const layer_rows & layer, bool v_trans, const std::vector<uint32_t> & order, size_t n_values, uint32_t hadamard_block,
            float * out) {
    const size_t n = order.size();
    if (!v_trans) {
        row_reader row("V", layer.type_v, layer.v_row, n_values);
        for (size_t i = 0; i < n; ++i) {
            row.read(layer.v + order[i] * layer.v_row, out + i * n_values);
        }
    } else {
        if (layer.v_row != ggml_row_size(layer.type_v, (int64_t) n_values)) {
            fail(KVP_ERR_LAYOUT, "V is %zu bytes wide, which %zu values of type %s do not make", layer.v_row, n_values,
                 ggml_type_name(layer.type_v));
        }
        if (n == 0) {
            return;
        }
        const auto [first, last] = std::minmax_element(order.begin(), order.end());
        const size_t       from = *first, span = *last - from + 1, value = ggml_type_size(layer.type_v); // block size 1
        row_reader         column("V", layer.type_v, span * value, span);
        std::vector<float> values(span);
        for (size_t j = 0; j < n_values; ++j) {
            column.read(layer.v + j * layer.v_column + from * value, values.data());
            for (size_t i = 0; i < n; ++i) {
                out[i * n_values + j] = values[order[i] - from];
            }
        }
    }
    if (hadamard_block) {
        hadamard(out, n * n_values, hadamard_block);
    }
}

} // namespace kvp
