// Values of a cache's types to f32 and back. The typed side may be unaligned, as blobs are.
#pragma once

#include "ggml.h"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvp {

// Whether a type that llama.cpp offers for a KV cache can be written without further data.
bool can_be_written(ggml_type type);

// n values, whole blocks. `aligned` is memory to work in. to_float throws KVP_ERR_UNSUPPORTED where ggml cannot read
// the type; from_float takes types that can be written.
void to_float(ggml_type type, const uint8_t * src, size_t n, float * out, std::vector<uint8_t> & aligned);
void from_float(ggml_type type, const float * src, size_t n, uint8_t * out, std::vector<uint8_t> & aligned);

} // namespace kvp
