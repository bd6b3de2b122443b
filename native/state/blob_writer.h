// Writing one cache of a state blob (state_blob.h has the layout).
#pragma once

#include "state/state_blob.h"

#include <cstring>

namespace kvp {

// Writes forward; the memory is large enough.
class blob_writer {
public:
    explicit blob_writer(uint8_t * at) : cur(at) {}

    template <typename T> void put(T value) {
        std::memcpy(cur, &value, sizeof(T));
        cur += sizeof(T);
    }
    void put(const uint8_t * bytes, size_t size) {
        std::memmove(cur, bytes, size); // what is moved up within a blob may overlap
        cur += size;
    }

    // n tokens of layers like these, whose rows put_k(il, where) and put_v(il, where) write: n * k_row bytes of keys,
    // n * v_row bytes of values, in columns if v_trans. They are called in the order in which layers lie in a blob.
    template <typename PutK, typename PutV>
    void put_cache(int32_t seq_id, const int32_t * positions, size_t n, bool v_trans, const std::vector<layer_rows> & layers,
                   PutK put_k, PutV put_v) {
        put<uint32_t>(1); // n_stream
        put<uint32_t>(uint32_t(n));
        for (size_t i = 0; i < n; ++i) {
            put<int32_t>(positions[i]);
            put<uint32_t>(1); // n_seq_id
            put<int32_t>(seq_id);
        }
        put<uint32_t>(v_trans);
        put<uint32_t>(uint32_t(layers.size()));
        for (size_t il = 0; il < layers.size(); ++il) {
            put<int32_t>(layers[il].type_k);
            put<uint64_t>(layers[il].k_row);
            put_k(il, cur);
            cur += n * layers[il].k_row;
        }
        for (size_t il = 0; il < layers.size(); ++il) {
            put<int32_t>(layers[il].type_v);
            if (v_trans) {
                const size_t value = ggml_type_size(layers[il].type_v);
                put<uint32_t>(uint32_t(value));
                put<uint32_t>(uint32_t(layers[il].v_row / value));
            } else {
                put<uint64_t>(layers[il].v_row);
            }
            put_v(il, cur);
            cur += n * layers[il].v_row;
        }
    }

    uint8_t * cur;
};

} // namespace kvp
