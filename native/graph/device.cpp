#include "graph/device.h"

#include "error.h"

namespace kvp {

device::device(ggml_backend_dev_t dev) : dev(dev), running(ggml_backend_dev_init(dev, nullptr)) {
    if (running) {
        allocator.reset(ggml_gallocr_new(ggml_backend_get_default_buffer_type(running.get())));
    }
    if (!running || !allocator) {
        fail(KVP_ERR_UNSUPPORTED, "ggml could not open the device %s a second time", name());
    }
}

owned<ggml_backend_buffer, ggml_backend_buffer_free> device::allocate(ggml_context * context) {
    owned<ggml_backend_buffer, ggml_backend_buffer_free> buffer(ggml_backend_alloc_ctx_tensors(context, running.get()));
    if (!buffer) {
        fail(KVP_ERR_MEMORY, "there is not enough memory on the device %s", name());
    }
    return buffer;
}

size_t device::free_memory() const {
    size_t free = 0, total = 0;
    ggml_backend_dev_memory(dev, &free, &total);
    return free;
}

void device::use_threads(int32_t n) {
    const auto use = reinterpret_cast<ggml_backend_set_n_threads_t>(
        ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(dev), "ggml_backend_set_n_threads"));
    if (use) {
        use(running.get(), n);
    }
}

void device::set(ggml_tensor * tensor, const void * data, size_t size) {
    ggml_backend_tensor_set(tensor, data, 0, size);
    bytes_transferred += size;
}

void device::get(const ggml_tensor * tensor, void * data, size_t size) {
    ggml_backend_tensor_get(tensor, data, 0, size);
    bytes_transferred += size;
}

ggml_tensor * mul_mat_f32(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b) {
    ggml_tensor * product = ggml_mul_mat(ctx, a, b);
    ggml_prec_set_acc(product, GGML_PREC_F32);
    return product;
}

device_graph::device_graph(device & on, size_t most_nodes)
    : on(on), space(most_nodes, most_nodes), graph(ggml_new_graph_custom(ctx(), most_nodes, false)) {}

ggml_tensor * device_graph::output(ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2) {
    ggml_tensor * tensor = ggml_new_tensor_3d(ctx(), type, ne0, ne1, ne2);
    ggml_set_input(tensor); // allocated before all others, and shared with none
    ggml_set_output(tensor);
    return tensor;
}

ggml_tensor * device_graph::input(ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2, const void * data) {
    uploads.push_back({ output(type, ne0, ne1, ne2), data });
    return uploads.back().tensor;
}

void device_graph::compute(ggml_tensor * node) { ggml_build_forward_expand(graph, node); }

void device_graph::prepare() {
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        const ggml_tensor * node = ggml_graph_node(graph, i);
        if (!ggml_backend_supports_op(on.backend(), node)) {
            fail(KVP_ERR_UNSUPPORTED, "the device %s lacks %s for type %s", on.name(), ggml_op_desc(node),
                 ggml_type_name(node->src[0] ? node->src[0]->type : node->type));
        }
    }
    if (!ggml_gallocr_alloc_graph(on.allocator.get(), graph)) {
        fail(KVP_ERR_MEMORY, "there is not enough memory on the device %s", on.name());
    }
}

void device_graph::run() {
    for (const upload & u : uploads) {
        on.set(u.tensor, u.data, ggml_nbytes(u.tensor));
    }
    const ggml_status status = ggml_backend_graph_compute(on.backend(), graph);
    if (status != GGML_STATUS_SUCCESS) {
        fail(KVP_ERR_RUNTIME, "the device %s failed: %s", on.name(), ggml_status_to_string(status));
    }
}

} // namespace kvp
