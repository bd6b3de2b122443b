// kvp_cache: one context's KV cache. Opened by cache_open.cpp, read by cache_rows.cpp, changed by cache_pack.cpp, read
// into a KV log and filled from it by cache_log.cpp; cache_api.cpp is the C interface to it.
#pragma once

#include "cache/context_memory.h"
#include "cache/location.h"
#include "error.h"
#include "state/fill_plan.h"
#include "state/pack_plan.h"
#include "state/rows.h"
#include "state/state_blob.h"
#include "kvp_edge.h"
#include "observe/observer.h"

#include "llama.h"

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace kvp {

// Rows of tokens: in a state blob, or (the layers in host memory) in the cache itself.
struct token_rows {
    bool                    v_trans = false;
    std::vector<layer_rows> layers;
    std::vector<uint32_t>   order; // where each token lies there, in ascending position order
    bool                    in_place = false;
};

} // namespace kvp

struct kvp_cache {
public:
    // See kvp_cache_open; observer may be nullptr.
    kvp_cache(llama_context * ctx, kvp_observer * observer);
    kvp_cache(const kvp_cache &)             = delete;
    kvp_cache & operator=(const kvp_cache &) = delete;

    const kvp_cache_shape & shape() const { return layout; }
    int32_t                 n_threads() const { return memory.n_threads(); } // of the context
    kvp_cache_location      location_info() const;

    // -- reading
    // Where rows may be: in host memory or a state; on devices, too, where those of layers on them are null;
    // or in a state alone.
    enum class from { host, anywhere, state };

    // The rows of the tokens at [p0, p1), checked against what the caller expects there; fills positions. What is in
    // a state is valid until the next call that takes one.
    kvp::token_rows find_rows(kvp_llama_position p0, kvp_llama_position p1, uint32_t n, kvp_llama_position * positions, from where);

    // Calls each(il, keys or values as f32 [n, n_head_kv * head_size] in ascending position order) for the
    // layers that are not on a device.
    template <typename Each> void each_layer(const kvp::token_rows & tokens, bool want_v, Each each) {
        const size_t n_values = size_t(layout.n_head_kv) * (want_v ? layout.head_size_v : layout.head_size_k);
        row_buffer.resize(tokens.order.size() * n_values);
        for (uint32_t il = 0; il < layout.n_layer; ++il) {
            const kvp::layer_rows & layer = tokens.layers[il];
            if (!layer.k) {
                continue;
            }
            if (want_v) {
                kvp::read_v(layer, tokens.v_trans, tokens.order, n_values, layout.v_hadamard_block, row_buffer.data());
            } else {
                kvp::read_k(layer, tokens.order, n_values, layout.k_hadamard_block, row_buffer.data());
            }
            each(il, row_buffer.data());
        }
    }

    // See kvp_cache_read.
    void read(kvp_llama_position p0, kvp_llama_position p1, uint32_t n, kvp_llama_position * positions, float * keys, float * values);

    // See kvp_cache_log_rows.
    void log_rows(const kvp_log_layout & log, kvp_llama_position p0, kvp_llama_position p1, uint32_t n, uint8_t * rows);

    // Calls score(location, cells of the n tokens at [p0, p1)), or throws KVP_ERR_UNSUPPORTED if they are not known.
    template <typename Score> void in_place(kvp_llama_position p0, kvp_llama_position p1, uint32_t n, Score score) {
        std::vector<int32_t>        positions(n);
        const std::vector<kvp_cell_index> cells = known_cells(p0, p1, n, positions.data());
        if (cells.empty() && n > 0) {
            kvp::fail(KVP_ERR_UNSUPPORTED, "it is not known where the tokens at positions [%d, %d) lie", p0, p1);
        }
        if (n > 0) {
            memory.wait();
            score(*location, cells);
        }
    }
    // The layers on devices, of rows that find_rows() found in place.
    std::vector<kvp::device_part *> device_parts() { return location->on_devices(); }

    // Compares the cells followed with llama.cpp's own state; false if they are not known.
    bool check_cells(const kvp_llama_position * present, uint32_t n);

    // -- changing
    // Removes the tokens at present[i] where keep[i] is 0, and returns in how many ranges.
    uint32_t remove(const kvp_llama_position * present, const uint8_t * keep, uint32_t n);
    void     move(const kvp_llama_position * present, const kvp_llama_position * positions, uint32_t n);
    void     check_packing();
    void     pack(const kvp::pack_plan & plan);
    void     fill(const kvp::fill_plan & plan);
    void     restore(const uint8_t * bytes, size_t size, const kvp_llama_position * present, uint32_t n);
    // Throws unless `bytes` is a state of a cache like this one that holds the n positions `present`.
    void check_state(const uint8_t * bytes, size_t size, const kvp_llama_position * present, uint32_t n) const;

    // -- what the owner of the context does itself
    void appended(kvp_llama_position first, uint32_t n);
    void forget();

private:
    // opening
    void refuse_if_not_empty() const;
    void learn_shape(const kvp::state_blob & state, const std::string & arch);
    void find_location(std::unique_ptr<kvp::cell_watcher> watcher, const kvp::blob_cache & trial);
    void clear_again();

    // reading
    // The cells of the n tokens at [p0, p1), and their positions; none if they are not known.
    std::vector<kvp_cell_index> known_cells(kvp_llama_position p0, kvp_llama_position p1, uint32_t n, kvp_llama_position * positions) const;
    size_t                blob_bound(uint32_t n) const;

    // changing
    void             remove_range(kvp_llama_position p0, kvp_llama_position p1);
    bool             try_to_pack_in_place(const kvp::pack_plan & plan, int32_t newest);
    bool             try_to_fill_in_place(const kvp::fill_plan & plan, kvp::fill_sources & sources);
    bool             thins_window(const kvp::pack_plan & plan, const std::vector<uint32_t> & survivors) const;
    void             defragment(const kvp_llama_position * positions, uint32_t n);
    void             set_state(const uint8_t * bytes, size_t size, int32_t newest);
    [[noreturn]] void clear_after_failure(const kvp::error & e);

    kvp::context_memory          memory;
    kvp_cache_shape              layout{};
    std::optional<kvp::location> location;    // where the cache lies, if that is known
    std::string                  why_unknown; // else
    std::vector<float>           row_buffer;  // one layer's keys or values
    uint64_t                     bytes_checked = 0; // read from devices, to see where a state went
    uint32_t                     packed_in_place = 0, packed_as_state = 0;
};
