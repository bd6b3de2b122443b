// Copying one head's part of a row.
#pragma once

#include <cstddef>
#include <type_traits>

namespace kvp {

// Calls work(bytes of one head's slice), where the usual head sizes in f16 and f32 are constants of the
// compiler's: a copy of known length is a few moves.
template <typename Work> void with_slice_size(size_t slice, Work work) {
    switch (slice) {
        case 64:  return work(std::integral_constant<size_t, 64>());
        case 128: return work(std::integral_constant<size_t, 128>());
        case 192: return work(std::integral_constant<size_t, 192>());
        case 256: return work(std::integral_constant<size_t, 256>());
        default:  return work(slice);
    }
}

} // namespace kvp
