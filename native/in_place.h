// A context's base cache where it lies: read, scored and packed without llama.cpp's state in between. Layers
// in host memory are reached through pointers, others by graphs on the device that holds them.
#pragma once

#include "cells.h"
#include "device.h"
#include "pack.h"
#include "policy.h"
#include "state_blob.h"
#include "tensor_space.h"
#include "watch.h"

#include <memory>
#include <string>
#include <vector>

namespace kvp {

constexpr size_t WORD_BYTES = sizeof(float);

// One layer's tensors in a device's memory.
struct device_layer {
    uint32_t            il; // in the base cache
    const ggml_tensor * k;
    const ggml_tensor * v;
    ggml_tensor *       k_words; // the same memory as words of 32 bits, f32 [row / 4, cells], so that rows are
    ggml_tensor *       v_words; // moved bit by bit, whatever their type; null if rows are no whole words
};

// The layers that lie on one device.
struct device_part {
    std::unique_ptr<device>        on;
    std::vector<device_layer>      layers;
    tensor_space                   words;
    std::unique_ptr<device_policy> policy; // the one that was used last
};

class in_place {
public:
    // Finds the base cache's layers, of n_cells each, among all that `watch` saw by what `trial` says of the
    // tokens decoded since. Throws KVP_ERR_UNSUPPORTED where they are not found, or a device cannot pack them.
    in_place(kvp_watch & watch, const blob_cache & trial, const kvp_cache_shape & shape, uint32_t n_cells);

    cell_map cells;

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
    void pack(const pack_plan & plan, const std::vector<uint32_t> & survivors, const std::vector<uint32_t> & cells);

    // Whether every device has memory to spare for n more rows.
    bool has_room(size_t n) const;

    // What the first layer's keys in these cells look like: equal where they are equal. Few bytes cross.
    std::vector<float> look(const std::vector<uint32_t> & cells);

    // Where a cell's bytes in the cache are not those of the blob, KVP_ERR_RUNTIME; order[i] is the blob's
    // cell whose token lies in cells[i].
    void compare(const blob_cache & blob, const std::vector<uint32_t> & order, const std::vector<uint32_t> & cells) const;

    // Whether the first layer holds the keys of `blob` in its first cells, in the same order.
    bool begins_with(const blob_cache & blob) const;

private:
    struct tensors {
        const ggml_tensor * k;
        const ggml_tensor * v;
    };

    bool holds(const tensors & t, const layer_rows & want, const std::vector<uint32_t> & order,
               const std::vector<uint32_t> & cells) const;
    void place(const tensors & t, const layer_rows & like);
    void try_packing();

    kvp_cache_shape          shape;
    uint32_t                 n_cells;
    std::vector<tensors>     layers;
    std::vector<layer_rows>  host;
    std::vector<device_part> parts;
    device_part              cpu; // the layers in host memory, for graphs; made when the first one asks
};

} // namespace kvp
