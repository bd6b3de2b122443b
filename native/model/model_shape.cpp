// What a GGUF file says of its model: read before anything is loaded, so that a budget in bytes can be
// turned into cells and a foreign file can be refused in a sentence.
#include "error.h"

#include "ggml.h"
#include "gguf.h"

#include <cstring>
#include <memory>
#include <string>

namespace {

using kvp::fail;
using gguf_ptr = std::unique_ptr<gguf_context, decltype(&gguf_free)>;

// {arch}.* keys are u32 by convention, but converters have written other integer types.
uint32_t as_u32(gguf_type type, const void * data, size_t i) {
    switch (type) {
        case GGUF_TYPE_UINT32: return static_cast<const uint32_t *>(data)[i];
        case GGUF_TYPE_INT32:  return static_cast<uint32_t>(static_cast<const int32_t *>(data)[i]);
        case GGUF_TYPE_UINT16: return static_cast<const uint16_t *>(data)[i];
        case GGUF_TYPE_UINT64: return static_cast<uint32_t>(static_cast<const uint64_t *>(data)[i]);
        default: fail(KVP_ERR_FILE, "the model file holds a number of GGUF type %d where an integer belongs", (int) type);
    }
}

class metadata {
public:
    explicit metadata(const char * path) : file(open(path), gguf_free) {
        const int64_t id = gguf_find_key(file.get(), "general.architecture");
        if (id < 0 || gguf_get_kv_type(file.get(), id) != GGUF_TYPE_STRING) {
            fail(KVP_ERR_FILE, "'%s' is a GGUF file without general.architecture: not a language model", path);
        }
        arch = gguf_get_val_str(file.get(), id);
    }

    // The i-th value of {arch}.{key}; a scalar counts for every i. `fallback` when the key is absent.
    uint32_t u32(const char * key, uint32_t fallback, size_t i = 0) const {
        const std::string name = arch + "." + key;
        const int64_t     id   = gguf_find_key(file.get(), name.c_str());
        if (id < 0) {
            return fallback;
        }
        if (gguf_get_kv_type(file.get(), id) != GGUF_TYPE_ARRAY) {
            const gguf_type type = gguf_get_kv_type(file.get(), id);
            return as_u32(type, type == GGUF_TYPE_STRING ? nullptr : gguf_get_val_data(file.get(), id), 0);
        }
        if (i >= gguf_get_arr_n(file.get(), id)) {
            fail(KVP_ERR_FILE, "the model file's %s has %zu values, fewer than its layers", name.c_str(),
                 gguf_get_arr_n(file.get(), id));
        }
        const gguf_type type = gguf_get_arr_type(file.get(), id);
        // gguf_get_arr_data aborts on strings, so they are refused first
        return as_u32(type, type == GGUF_TYPE_STRING ? nullptr : gguf_get_arr_data(file.get(), id), i);
    }

    uint32_t required(const char * key) const {
        const uint32_t value = u32(key, 0);
        if (value == 0) {
            fail(KVP_ERR_FILE, "the model file has no %s.%s: not a complete language model", arch.c_str(), key);
        }
        return value;
    }

    std::string arch;

private:
    static gguf_context * open(const char * path) {
        gguf_init_params params{};
        params.no_alloc = true;
        gguf_context * ctx = gguf_init_from_file(path, params);
        if (!ctx) {
            fail(KVP_ERR_FILE, "'%s' cannot be read as a GGUF file: it is missing, truncated or of another format", path);
        }
        return ctx;
    }

    gguf_ptr file;
};

} // namespace

extern "C" int32_t kvp_model_shape_read(const char * path, kvp_model_shape * shape, kvp_error * err) {
    return kvp::guard(err, [&] {
        if (!path || !shape) {
            fail(KVP_ERR_ARGUMENT, "kvp_model_shape_read: path and shape must not be NULL");
        }
        const metadata meta(path);

        std::memset(shape, 0, sizeof(*shape));
        std::snprintf(shape->architecture, sizeof(shape->architecture), "%s", meta.arch.c_str());
        shape->n_layer = meta.required("block_count");
        if (shape->n_layer > KVP_MAX_LAYERS) {
            fail(KVP_ERR_FILE, "the model file claims %u layers; llama.cpp allows %d", shape->n_layer, KVP_MAX_LAYERS);
        }
        shape->n_ctx_train    = meta.required("context_length");
        shape->sliding_window = meta.u32("attention.sliding_window", 0);

        // Recurrent models have no heads: sizes stay 0 and kvp_cache_open says why they are refused.
        const uint32_t n_head   = meta.u32("attention.head_count", 0);
        const uint32_t per_head = n_head ? meta.required("embedding_length") / n_head : 0;
        shape->head_size_k      = meta.u32("attention.key_length", per_head);
        shape->head_size_v      = meta.u32("attention.value_length", per_head);
        for (uint32_t il = 0; il < shape->n_layer; ++il) {
            shape->n_head_kv[il] = meta.u32("attention.head_count_kv", n_head, il);
        }
    });
}

extern "C" int32_t kvp_model_bytes_per_cell(const kvp_model_shape * shape, int32_t type_k, int32_t type_v,
                                            uint64_t * bytes, kvp_error * err) {
    return kvp::guard(err, [&] {
        if (!shape || !bytes || shape->n_layer > KVP_MAX_LAYERS) {
            fail(KVP_ERR_ARGUMENT, "kvp_model_bytes_per_cell: shape and bytes must not be NULL");
        }
        const auto row = [&](int32_t type, uint32_t head_size, uint32_t n_head) -> uint64_t {
            if (type < 0 || type >= GGML_TYPE_COUNT || ggml_blck_size(ggml_type(type)) == 0) {
                fail(KVP_ERR_ARGUMENT, "%d is not a ggml type that a cache can have", type);
            }
            const int64_t n = int64_t(head_size) * n_head;
            if (n % ggml_blck_size(ggml_type(type)) != 0) {
                fail(KVP_ERR_UNSUPPORTED, "a cache of type %s needs rows of whole blocks of %d values, but %u heads of %u make %d",
                     ggml_type_name(ggml_type(type)), (int) ggml_blck_size(ggml_type(type)), n_head, head_size, (int) n);
            }
            return ggml_row_size(ggml_type(type), n);
        };
        uint64_t sum = 0;
        for (uint32_t il = 0; il < shape->n_layer; ++il) {
            sum += row(type_k, shape->head_size_k, shape->n_head_kv[il]);
            sum += row(type_v, shape->head_size_v, shape->n_head_kv[il]);
        }
        *bytes = sum;
    });
}
