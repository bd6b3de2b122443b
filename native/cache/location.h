// Where a context's base cache lies: which tensors hold it, in host memory or on devices, and which cell the token at
// each position lies in. There it is read, scored and packed, without llama.cpp's state in between: layers in host
// memory through pointers, others by graphs on the device that holds them.
#pragma once

#include "cache/cell_map.h"
#include "state/fill_plan.h"
#include "state/pack_plan.h"
#include "state/state_blob.h"
#include "graph/device_part.h"
#include "graph/policy.h"
#include "kvp_edge.h"
#include "observe/cell_watcher.h"

#include "ggml.h"

#include <memory>
#include <string>
#include <vector>

namespace kvp {

class location {
public:
    // Finds the base cache's layers, of n_cells each, among all that `watcher` saw by what `trial` says of the
    // tokens decoded since. Throws KVP_ERR_UNSUPPORTED where they are not found, or a device cannot pack them.
    location(std::unique_ptr<cell_watcher> watcher, const blob_cache & trial, const kvp_cache_shape & shape, uint32_t n_cells);

    // -- which cells: what happens to the conversation is told here, and remembered.
    // The n tokens decoded last are at positions first, first + 1, ...
    void appended(kvp_llama_position first, uint32_t n) { known.append(first, n, watcher->take(n)); }
    void removed(kvp_llama_position p0, kvp_llama_position p1) { known.remove(p0, p1 < 0 ? INT32_MAX : p1); }
    void moved(const kvp_llama_position * from, const kvp_llama_position * to, uint32_t n) { known.rename(from, to, n); }
    // The conversation is the tokens at these positions, in these cells.
    void are_in(const kvp_llama_position * positions, const std::vector<uint32_t> & where) { known.assign(positions, where); }
    void forget() { known.clear(); }

    // The positions in [p0, p1) whose cells are known, ascending; and the cells of n positions, or none if one is not
    // known.
    std::vector<kvp_llama_position> positions(kvp_llama_position p0, kvp_llama_position p1) const { return known.positions(p0, p1); }
    std::vector<kvp_cell_index> cells_of(const kvp_llama_position * positions, uint32_t n) const { return known.find(positions, n); }

    // -- which memory
    // Whether heads can be packed: on a device they must be whole words.
    bool can_pack() const;
    bool on_host() const { return parts.empty(); }
    bool on_host(uint32_t il) const { return host[il].k != nullptr; }
    // Where the devices' names, comma between them, are for people to read.
    std::string devices() const;
    uint64_t    bytes_transferred() const;

    // The layers in host memory; the others are null. Cells are those of the cache.
    const std::vector<layer_rows> & rows() const { return host; }

    // The layers that lie on devices; and all layers, those in host memory as a part of their own, for graphs on
    // the CPU with so many threads.
    std::vector<device_part *> on_devices();
    std::vector<device_part *> with_host(int32_t n_threads);

    // Lets every head keep its rows (plan.keep, ascending) in the cells of the rows `survivors`; `cells` are
    // those of all rows. Throws KVP_ERR_UNSUPPORTED and _MEMORY before anything is changed.
    void pack(const pack_plan & plan, const std::vector<uint32_t> & survivors, const std::vector<kvp_cell_index> & cells);

    // Gives every head the rows that the plan names, in the same cells, which are those of all rows and lie in host memory.
    // Throws std::bad_alloc alone, before anything is changed.
    void fill(const fill_plan & plan, fill_sources & sources, const std::vector<kvp_cell_index> & cells);

    // Whether every device has memory to spare for n more rows.
    bool has_room(size_t n) const;

    // The norms of the first layer's keys in these cells, negated: by them keys are recognised where few bytes shall
    // cross.
    std::vector<float> key_norms(const std::vector<kvp_cell_index> & cells);

    // Where a cell's bytes in the cache are not those of the blob, KVP_ERR_RUNTIME; order[i] is the blob's
    // cell whose token lies in cells[i].
    void compare(const blob_cache & blob, const std::vector<uint32_t> & order, const std::vector<kvp_cell_index> & cells) const;

    // Whether the first layer holds the keys of `blob` in its first cells, in the same order.
    bool begins_with(const blob_cache & blob) const;

private:
    struct tensors {
        const ggml_tensor * k;
        const ggml_tensor * v;
    };

    bool holds(const tensors & t, const layer_rows & want, const std::vector<uint32_t> & order,
               const std::vector<kvp_cell_index> & cells) const;
    void add_layer(const tensors & t, const layer_rows & like);
    void try_packing();

    std::unique_ptr<cell_watcher> watcher;
    cell_map                      known; // where each token lies
    kvp_cache_shape               shape;
    uint32_t                      n_cells;
    std::vector<tensors>          layers;
    std::vector<layer_rows>       host;
    std::vector<device_part>      parts;
    device_part                   cpu; // the layers in host memory, for graphs; made when the first one asks
};

} // namespace kvp
