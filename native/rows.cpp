#include "rows.h"

#include "error.h"

#include <cmath>
#include <cstdlib>
#include <cstring>

namespace kvp {

rotation rotation_of(ggml_type type_k, ggml_type type_v, uint32_t head_size_k, uint32_t head_size_v) {
    const char * disable = std::getenv("LLAMA_ATTN_ROT_DISABLE");
    rotation     rot;
    if (disable && std::atoi(disable) != 0) {
        return rot;
    }
    if (ggml_is_quantized(type_k) && head_size_k % 64 == 0) {
        rot.k = 64;
        while (head_size_k % (2 * rot.k) == 0) {
            rot.k *= 2;
        }
    }
    if (ggml_is_quantized(type_v) && head_size_v % 64 == 0) {
        rot.v = 64;
    }
    return rot;
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

// n values of any ggml type -> f32. `src` may be unaligned: blobs are packed.
void to_float(ggml_type type, const uint8_t * src, size_t n, float * out, std::vector<uint8_t> & aligned) {
    const size_t bytes = ggml_row_size(type, (int64_t) n);
    aligned.resize(bytes);
    std::memcpy(aligned.data(), src, bytes);
    if (type == GGML_TYPE_F32) {
        std::memcpy(out, aligned.data(), bytes);
        return;
    }
    const ggml_to_float_t convert = ggml_get_type_traits(type)->to_float;
    if (!convert) {
        fail(KVP_ERR_UNSUPPORTED, "a cache of type %s cannot be read back", ggml_type_name(type));
    }
    convert(aligned.data(), out, (int64_t) n);
}

void check_width(const char * side, ggml_type type, size_t row, size_t n_values) {
    if (n_values % ggml_blck_size(type) != 0 || row != ggml_row_size(type, (int64_t) n_values)) {
        fail(KVP_ERR_LAYOUT, "a row of %s has %zu bytes, which %zu values of type %s do not make", side, row, n_values,
             ggml_type_name(type));
    }
}

} // namespace

void read_k(const blob_layer & layer, size_t n_cells, size_t n_values, uint32_t rot, float * out) {
    check_width("K", layer.type_k, layer.k_row, n_values);
    std::vector<uint8_t> aligned;
    to_float(layer.type_k, layer.k, n_cells * n_values, out, aligned);
    if (rot) {
        hadamard(out, n_cells * n_values, rot);
    }
}

void read_v(const blob_layer & layer, bool v_trans, size_t n_cells, size_t n_values, uint32_t rot, float * out) {
    check_width("V", layer.type_v, layer.v_row, n_values);
    std::vector<uint8_t> aligned;
    if (!v_trans) {
        to_float(layer.type_v, layer.v, n_cells * n_values, out, aligned);
    } else {
        std::vector<float> columns(n_cells * n_values); // [n_values, n_cells]
        to_float(layer.type_v, layer.v, n_cells * n_values, columns.data(), aligned);
        for (size_t c = 0; c < n_cells; ++c) {
            for (size_t j = 0; j < n_values; ++j) {
                out[c * n_values + j] = columns[j * n_cells + c];
            }
        }
    }
    if (rot) {
        hadamard(out, n_cells * n_values, rot);
    }
}

} // namespace kvp
