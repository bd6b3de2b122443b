// One context's KV cache behind the C interface: how it is opened (cache_open.cpp), where tokens' rows are found
// (cache_rows.cpp) and how it is packed (cache_pack.cpp).
#pragma once

#include "error.h"
#include "in_place.h"
#include "kvp_edge.h"
#include "pack.h"
#include "rows.h"
#include "state_blob.h"
#include "watch.h"

#include "llama.h"

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace kvp {

constexpr llama_seq_id SEQ_CHAT = 0;
constexpr llama_seq_id SEQ_READ = 1; // tags the cells being read; empty between calls

// Memory for blobs: grows, is never zeroed, and is kept, so that an eviction does not fault its pages in anew.
class byte_buffer {
public:
    uint8_t * room_for(size_t size) {
        if (size > capacity) {
            bytes.reset(); // frees before it takes: the old content is never needed
            capacity = 0;
            bytes.reset(new uint8_t[size]);
            capacity = size;
        }
        return bytes.get();
    }
    uint8_t * data() { return bytes.get(); }

private:
    std::unique_ptr<uint8_t[]> bytes;
    size_t                     capacity = 0;
};

// Rows of tokens: in a state blob, or (the layers in host memory) in the cache itself.
struct token_rows {
    bool                    v_trans = false;
    std::vector<layer_rows> layers;
    std::vector<uint32_t>   order; // where each token lies there, in ascending position order
    bool                    in_place = false;
};

// The architecture that a model's metadata name.
std::string architecture(const llama_model * model);

// Indices of positions, ascending.
std::vector<uint32_t> ascending(const std::vector<int32_t> & positions);

} // namespace kvp

struct kvp_cache {
    llama_context *    ctx;
    llama_memory_t     mem;
    kvp_cache_shape    shape{};
    kvp::byte_buffer   blob; // reused between reads
    std::vector<float> rows; // one layer's keys or values

    kvp_watch *                  watch = nullptr;
    std::optional<kvp::in_place> place;       // where the cache lies, if that is known
    std::string                  why_not;     // else
    uint64_t                     bytes_transferred = 0; // bytes of llama.cpp's states, taken and given
    uint32_t                     packed = 0, packed_as_state = 0;

    // -- opening
    void open();
    void check_packing();

    // -- reading
    // Where rows may be: in host memory or a state; on devices, too, where those of layers on them are null;
    // or in a state alone.
    enum class from { host, anywhere, state };

    // The rows of the tokens at [p0, p1), checked against what the caller expects there; fills positions.
    kvp::token_rows find_rows(int32_t p0, int32_t p1, uint32_t n, int32_t * positions, from where);

    // Calls score(place, cells of the n tokens at [p0, p1)), or throws KVP_ERR_UNSUPPORTED if they are not known.
    template <typename Score> void place_of(int32_t p0, int32_t p1, uint32_t n, Score score) {
        std::vector<int32_t>        positions(n);
        const std::vector<uint32_t> cells = known_cells(p0, p1, n, positions.data());
        if (cells.empty() && n > 0) {
            kvp::fail(KVP_ERR_UNSUPPORTED, "it is not known where the tokens at positions [%d, %d) lie", p0, p1);
        }
        if (n > 0) {
            llama_synchronize(ctx);
            score(*place, cells);
        }
    }

    // Calls each(il, keys or values as f32 [n, n_head_kv * head_size] in ascending position order) for the
    // layers that are not on a device.
    template <typename Each> void each_layer(const kvp::token_rows & tokens, bool want_v, Each each) {
        const size_t n_values = size_t(shape.n_head_kv) * (want_v ? shape.head_size_v : shape.head_size_k);
        rows.resize(tokens.order.size() * n_values);
        for (uint32_t il = 0; il < shape.n_layer; ++il) {
            const kvp::layer_rows & layer = tokens.layers[il];
            if (!layer.k) {
                continue;
            }
            if (want_v) {
                kvp::read_v(layer, tokens.v_trans, tokens.order, n_values, shape.v_hadamard_block, rows.data());
            } else {
                kvp::read_k(layer, tokens.order, n_values, shape.k_hadamard_block, rows.data());
            }
            each(il, rows.data());
        }
    }

    // Compares the cells followed with llama.cpp's own state; false if they are not known.
    bool check_cells(const int32_t * present, uint32_t n);

    // -- changing
    // Removes positions [p0, p1) of the conversation.
    void remove(int32_t p0, int32_t p1);
    void move(const int32_t * present, const int32_t * positions, uint32_t n);
    void pack(const kvp::pack_plan & plan);
    void restore(const uint8_t * bytes, size_t size, const int32_t * present, uint32_t n);
    // Throws unless `bytes` is a state of a cache like this one that holds the n positions `present`.
    void check_state(const uint8_t * bytes, size_t size, const int32_t * present, uint32_t n) const;

private:
    // The cells of the n tokens at [p0, p1), and their positions; none if they are not known.
    std::vector<uint32_t> known_cells(int32_t p0, int32_t p1, uint32_t n, int32_t * positions) const;

    void             refuse_if_not_empty() const;
    void             decode(llama_token * tokens, int32_t n, int32_t start = 0);
    void             learn_shape(const kvp::state_blob & state, const llama_model * model, const std::string & arch);
    void             find_place(const kvp::blob_cache & trial);
    void             clear_again();
    size_t           take_state(llama_seq_id seq, size_t upper_bound);
    kvp::state_blob  read_blob(int32_t p0, int32_t p1, size_t upper_bound = 0);
    size_t           blob_bound(uint32_t n) const;
    bool             pack_in_place(const kvp::pack_plan & plan, int32_t newest);
    bool             thins_window(const kvp::pack_plan & plan, const std::vector<uint32_t> & survivors) const;
    void             defragment(const int32_t * positions, uint32_t n);
    void             set_state(const uint8_t * bytes, size_t size, int32_t newest);
    [[noreturn]] void clear_after_failure(const kvp::error & e);
};
