// The tensors of a GGUF file, one per line: what a model's fingerprint is made of.
#include "error.h"

#include "ggml.h"
#include "gguf.h"

#include <cinttypes>
#include <cstring>
#include <memory>
#include <string>

using kvp::fail;

extern "C" int32_t kvp_model_tensors(const char * path, char * text, uint64_t size, uint64_t * needed, kvp_error * err) {
    return kvp::guard(err, [&] {
        if (!path || !needed || (size > 0 && !text)) {
            fail(KVP_ERR_ARGUMENT, "kvp_model_tensors: path, needed and text must not be NULL");
        }
        ggml_context *   made = nullptr;
        gguf_init_params params{};
        params.no_alloc = true;
        params.ctx      = &made;
        const std::unique_ptr<gguf_context, decltype(&gguf_free)> file(gguf_init_from_file(path, params), gguf_free);
        const std::unique_ptr<ggml_context, decltype(&ggml_free)> tensors(made, ggml_free);
        if (!file || !tensors) {
            fail(KVP_ERR_FILE, "'%s' cannot be read as a GGUF file: it is missing, truncated or of another format", path);
        }
        std::string all;
        for (int64_t i = 0; i < gguf_get_n_tensors(file.get()); ++i) {
            const char *        name   = gguf_get_tensor_name(file.get(), i);
            const ggml_tensor * tensor = ggml_get_tensor(tensors.get(), name);
            char                line[256];
            std::snprintf(line, sizeof(line), " %s %" PRId64 " %" PRId64 " %" PRId64 " %" PRId64 " %zu %zu\n",
                          ggml_type_name(tensor->type), tensor->ne[0], tensor->ne[1], tensor->ne[2], tensor->ne[3],
                          gguf_get_data_offset(file.get()) + gguf_get_tensor_offset(file.get(), i),
                          gguf_get_tensor_size(file.get(), i));
            all += name;
            all += line;
        }
        *needed = all.size() + 1;
        if (size >= *needed) {
            std::memcpy(text, all.c_str(), all.size() + 1);
        }
    });
}
