// Room for descriptions of tensors and for a graph of them, without their data. The memory is our own:
// ggml_init() ends the process where it finds none, and std::bad_alloc can be answered.
#pragma once

#include "owned.h"

#include "ggml.h"

#include <cstddef>
#include <vector>

namespace kvp {

class tensor_space {
public:
    tensor_space() = default;
    // For at most n_tensors, and if n_nodes is not 0, a graph of so many nodes of them.
    explicit tensor_space(size_t n_tensors, size_t n_nodes = 0) {
        const size_t size = ggml_tensor_overhead() * n_tensors + (n_nodes > 0 ? ggml_graph_overhead_custom(n_nodes, false) : 0);
        memory.resize((size + sizeof(block) - 1) / sizeof(block));
        context.reset(ggml_init({ size, memory.data(), true }));
    }

    ggml_context * get() const { return context.get(); }

private:
    struct alignas(GGML_MEM_ALIGN) block {
        unsigned char bytes[GGML_MEM_ALIGN];
    };

    // The memory outlives the context in it: members are destroyed from the last to the first.
    std::vector<block>             memory;
    owned<ggml_context, ggml_free> context;
};

} // namespace kvp
