#include "observe/cache_nodes.h"

#include <cstdlib>
#include <cstring>

namespace kvp {

int32_t layer_named(const ggml_tensor * t, const char * prefix) {
    const size_t n = std::strlen(prefix);
    return t && std::strncmp(t->name, prefix, n) == 0 ? std::atoi(t->name + n) : -1;
}

} // namespace kvp
