#include "state/convert.h"

#include "error.h"

#include <cstring>

namespace kvp {

bool can_be_written(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32:
        case GGML_TYPE_F16:
        case GGML_TYPE_BF16:
        case GGML_TYPE_Q8_0:
        case GGML_TYPE_Q5_1:
        case GGML_TYPE_Q5_0:
        case GGML_TYPE_Q4_1:
        case GGML_TYPE_Q4_0:
        case GGML_TYPE_IQ4_NL: return true;
        default: return false;
    }
}

void to_float(ggml_type type, const uint8_t * src, size_t n, float * out, std::vector<uint8_t> & aligned) {
    aligned.assign(src, src + ggml_row_size(type, (int64_t) n));
    if (type == GGML_TYPE_F32) {
        std::memcpy(out, aligned.data(), aligned.size());
        return;
    }
    const ggml_to_float_t convert = ggml_get_type_traits(type)->to_float;
    if (!convert) {
        fail(KVP_ERR_UNSUPPORTED, "a cache of type %s cannot be read back", ggml_type_name(type));
    }
    convert(aligned.data(), out, (int64_t) n);
}

void from_float(ggml_type type, const float * src, size_t n, uint8_t * out, std::vector<uint8_t> & aligned) {
    aligned.resize(ggml_row_size(type, (int64_t) n));
    ggml_quantize_chunk(type, src, aligned.data(), 0, 1, (int64_t) n, nullptr);
    std::memcpy(out, aligned.data(), aligned.size());
}

} // namespace kvp
