// A device whose memory the host does not see: graphs run on it, and every byte that crosses is counted.
#pragma once

#include "graph/tensor_space.h"
#include "owned.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml.h"

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace kvp {

class device {
public:
    // A backend of our own on it, beside llama.cpp's; throws KVP_ERR_UNSUPPORTED if there can be none.
    explicit device(ggml_backend_dev_t dev);

    const char *   name() const { return ggml_backend_dev_name(dev); }
    ggml_backend_t backend() const { return running.get(); }
    size_t         free_memory() const; // bytes
    void           use_threads(int32_t n); // where it has any to choose

    // Tensors of `context` get memory on the device.
    owned<ggml_backend_buffer, ggml_backend_buffer_free> allocate(ggml_context * context);
    void set(ggml_tensor * tensor, const void * data, size_t size);
    void get(const ggml_tensor * tensor, void * data, size_t size);

    uint64_t bytes_transferred = 0; // bytes of tensors, in both directions

private:
    friend class device_graph;

    ggml_backend_dev_t                     dev;
    owned<ggml_backend, ggml_backend_free> running;
    owned<ggml_gallocr, ggml_gallocr_free> allocator; // its memory is kept from graph to graph
};

// ggml_mul_mat that sums in f32: unless told, Vulkan sums in f16, up to 65504, where a GPU has the second
// kind of cooperative matrices. Operands may still be rounded to f16.
ggml_tensor * mul_mat_f32(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b);

// One graph: make it with `context`, name its inputs and what must be computed, run it, read results.
class device_graph {
public:
    device_graph(device & on, size_t most_nodes);

    ggml_context * ctx() const { return space.get(); }

    // A tensor whose content `data` is uploaded when the graph runs; it must live until then.
    ggml_tensor * input(ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2, const void * data);
    // A tensor that nodes write parts of.
    ggml_tensor * output(ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2);
    void          compute(ggml_tensor * node);

    // Before anything is computed: throws KVP_ERR_UNSUPPORTED if the device lacks an operation, and
    // KVP_ERR_MEMORY. One graph of a device can be ready at a time.
    void prepare();
    // Throws KVP_ERR_RUNTIME if the device fails; then what it wrote is not known.
    void run();

private:
    struct upload {
        ggml_tensor * tensor;
        const void *  data;
    };

    device &            on;
    tensor_space        space;
    ggml_cgraph *       graph;
    std::vector<upload> uploads;
};

} // namespace kvp
