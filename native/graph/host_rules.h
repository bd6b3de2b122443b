// Attention-free scores of keys. Larger = keep.
#pragma once

#include <cstddef>

namespace kvp {

// keys   f32 [n, n_head, head_size] (cell order: all heads of a token side by side)
// scores f32 [n_head, n]

// K-norm: -||k||_2. Devoto et al., arXiv:2406.11430, section 3.
void score_knorm(const float * keys, size_t n, size_t n_head, size_t head_size, float * scores);

// KeyDiff: -cos(k_i, mean_j k_j / ||k_j||). Park et al., arXiv:2504.15364, section 3.
// The mean runs over the n tokens given, so a token's score depends on its company.
void score_keydiff(const float * keys, size_t n, size_t n_head, size_t head_size, float * scores);

} // namespace kvp
