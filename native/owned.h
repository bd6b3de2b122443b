// Objects of ggml that are freed with their owner.
#pragma once

#include <memory>

namespace kvp {

template <auto release> struct with {
    template <typename T> void operator()(T * object) const { release(object); }
};
template <typename T, auto release> using owned = std::unique_ptr<T, with<release>>;

} // namespace kvp
