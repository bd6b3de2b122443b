// The arithmetic of attention over a few keys at a time, in the widest vectors that the processor has.
//
// A "column" is one query of one query head. Columns lie side by side, `width` of them, a multiple of COLUMNS; those
// that fill up are zero.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvp {

constexpr size_t COLUMNS = 16;

struct attention_kernel {
    const char * name;

    // n halves at any address as floats.
    void (*from_halves)(const uint8_t * halves, size_t n, float * out);

    // One step of a softmax over more keys than there are at once.
    //   keys     [n, head_size]
    //   queries  [head_size, width], times what q.k is multiplied by
    //   last     [width]: a column sees key i if first + i <= last. NULL: all see all
    //   logits   [n, width], memory to work in
    //   weights  [n, width], result: exp(logit - largest), 0 where the key is not seen
    //   largest  [width]: the largest logit so far, at first that of no key (NO_LOGIT)
    //   sum      [width]: of exp(logit - largest) so far
    // A logit that is no number counts as not seen, and one too large for a float as the largest float.
    void (*weigh)(const float * keys, size_t n, size_t head_size, const float * queries, size_t width, const int32_t * last,
                  int32_t first, float * logits, float * weights, float * largest, float * sum);

    // Attention, of weights [n, width] that were computed when `factor` [width] were the largest logits, which become
    // what weights are multiplied by: top [width] are the largest of all keys' logits, share [width] one by the sum of
    // all weights, or 0. Of each key the largest attention is put into `largest` [n] if it is larger than what is there,
    // and the sum added to `sum` [n].
    void (*reduce)(const float * weights, size_t n, size_t width, const float * top, const float * share, float * factor,
                   float * largest, float * sum);
};

constexpr float NO_LOGIT = -3.40282347e38f;

// Those that this processor can run, the best one first; NULL behind the last.
const attention_kernel * const * attention_kernels();

} // namespace kvp
