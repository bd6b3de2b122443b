#include "cache/location.h"

#include "error.h"
#include "state/rows.h"
#include "graph/graph_rows.h"
#include "graph/graph_scorers.h"
#include "graph/host_rules.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

namespace kvp {

namespace {

bool in_host_memory(const ggml_tensor * t) { return ggml_backend_buffer_is_host(t->buffer); }

// A tensor's first `size` bytes, wherever they are.
std::vector<uint8_t> bytes_of(const ggml_tensor * t, size_t size) {
    std::vector<uint8_t> bytes(size);
    ggml_backend_tensor_get(t, bytes.data(), 0, size);
    return bytes;
}

} // namespace

location::location(std::unique_ptr<cell_watcher> seeing, const blob_cache & trial, const kvp_cache_shape & shape, uint32_t n_cells)
    : watcher(std::move(seeing)), shape(shape), n_cells(n_cells) {
    const size_t value = ggml_type_size(ggml_type(shape.type_v));
    if (shape.v_transposed && value != sizeof(uint16_t) && value != sizeof(uint32_t)) {
        fail(KVP_ERR_UNSUPPORTED, "transposed values of type %s cannot be packed where they lie", ggml_type_name(ggml_type(shape.type_v)));
    }
    auto                  seen = watcher->follow(cell_watcher::NONE);
    std::vector<uint32_t> order(trial.pos.size());
    std::iota(order.begin(), order.end(), 0u); // the trial's positions ascend
    // Both caches of a model with sliding-window layers give their tensors names of the same kind, each with
    // layers of its own; the base cache's are those that hold what the base cache's state says.
    auto at = seen.begin();
    for (const layer_rows & want : trial.layers) {
        at = std::find_if(at, seen.end(), [&](const auto & layer) {
            const seen_cache &          c = layer.second;
            const std::vector<uint32_t> where(c.cells.begin(), c.cells.end());
            return where.size() == order.size() && holds({ c.k, c.v }, want, order, where);
        });
        if (at == seen.end()) {
            fail(KVP_ERR_UNSUPPORTED, "llama.cpp does not show where layer %zu of the base cache lies", layers.size());
        }
        layers.push_back({ at->second.k, at->second.v });
        if (layers.size() == 1) {
            watcher->follow(at->first); // the same cells in all layers
        }
        ++at;
    }
    for (size_t il = 0; il < layers.size(); ++il) {
        add_layer(layers[il], trial.layers[il]);
    }
    if (can_pack()) {
        try_packing();
    }
}

// Whether the tensors are laid out like `want` and hold its bytes. Also refuses what is no plain table of
// [row, cell], several streams for one.
bool location::holds(const tensors & t, const layer_rows & want, const std::vector<uint32_t> & order,
                     const std::vector<kvp_cell_index> & cells) const {
    if (!t.k || !t.v || !t.k->buffer || !t.v->buffer || t.k->type != want.type_k || t.v->type != want.type_v ||
        t.k->nb[1] != want.k_row || t.k->ne[2] != 1 || t.k->ne[3] != 1 || t.v->nb[1] != want.v_row || t.v->ne[2] != 1 ||
        t.v->ne[3] != 1 || t.k->ne[1] != n_cells || t.v->ne[1] != n_cells) {
        return false;
    }
    const size_t n = order.size();
    const size_t end = n ? *std::max_element(cells.begin(), cells.end()) + size_t(1) : 0;
    if (end > n_cells) {
        return false;
    }
    const auto same_rows = [&](const ggml_tensor * tensor, const uint8_t * rows, size_t row) {
        const std::vector<uint8_t> here = bytes_of(tensor, end * row);
        for (size_t i = 0; i < n; ++i) {
            if (std::memcmp(here.data() + cells[i] * row, rows + order[i] * row, row) != 0) {
                return false;
            }
        }
        return true;
    };
    if (!same_rows(t.k, want.k, want.k_row)) {
        return false;
    }
    if (!shape.v_transposed) {
        return same_rows(t.v, want.v, want.v_row);
    }
    const size_t               value = ggml_type_size(want.type_v), n_column = want.v_row / value;
    const std::vector<uint8_t> here = bytes_of(t.v, n_column * size_t(n_cells) * value);
    for (size_t j = 0; j < n_column; ++j) {
        for (size_t i = 0; i < n; ++i) {
            if (std::memcmp(here.data() + (j * size_t(n_cells) + cells[i]) * value, want.v + j * want.v_column + order[i] * value, value) != 0) {
                return false;
            }
        }
    }
    return true;
}

void location::add_layer(const tensors & t, const layer_rows & like) {
    layer_rows rows = like;
    rows.k = rows.v = nullptr;
    rows.v_column   = size_t(t.v->ne[1]) * ggml_type_size(t.v->type);
    const auto il   = uint32_t(host.size());
    if (in_host_memory(t.k) && in_host_memory(t.v)) {
        rows.k = static_cast<const uint8_t *>(t.k->data);
        rows.v = static_cast<const uint8_t *>(t.v->data);
        host.push_back(rows);
        return;
    }
    host.push_back(rows);
    const ggml_backend_dev_t dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(t.k->buffer));
    if (!dev || dev != ggml_backend_buft_get_device(ggml_backend_buffer_get_type(t.v->buffer))) {
        fail(KVP_ERR_UNSUPPORTED, "the keys and values of layer %u do not lie on one device", il);
    }
    const std::string name = ggml_backend_dev_name(dev);
    auto part = std::find_if(parts.begin(), parts.end(), [&](const device_part & p) { return p.on->name() == name; });
    if (part == parts.end()) {
        parts.emplace_back();
        part     = parts.end() - 1;
        part->on = std::make_unique<device>(dev);
        part->words = tensor_space(2 * KVP_MAX_LAYERS);
    }
    const auto as_words = [&](const ggml_tensor * tensor, size_t row) -> ggml_tensor * {
        if (row / shape.n_head_kv % WORD_BYTES != 0 || row % shape.n_head_kv != 0) {
            return nullptr;
        }
        ggml_tensor * words = ggml_new_tensor_2d(part->words.get(), GGML_TYPE_F32, int64_t(row / WORD_BYTES), tensor->ne[1]);
        if (ggml_backend_tensor_alloc(tensor->buffer, words, tensor->data) != GGML_STATUS_SUCCESS) {
            fail(KVP_ERR_UNSUPPORTED, "the device %s does not let its cache be seen as words", part->on->name());
        }
        return words;
    };
    part->layers.push_back({ il, t.k, t.v, as_words(t.k, like.k_row), shape.v_transposed ? nullptr : as_words(t.v, like.v_row) });
}

std::vector<device_part *> location::on_devices() {
    std::vector<device_part *> all;
    for (device_part & part : parts) {
        all.push_back(&part);
    }
    return all;
}

std::vector<device_part *> location::with_host(int32_t n_threads) {
    std::vector<device_part *> all = on_devices();
    if (cpu.layers.empty()) {
        for (uint32_t il = 0; il < host.size(); ++il) {
            if (on_host(il)) {
                cpu.layers.push_back({ il, layers[il].k, layers[il].v, nullptr, nullptr });
            }
        }
    }
    if (!cpu.layers.empty()) {
        if (!cpu.on) {
            cpu.on = std::make_unique<device>(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU));
        }
        cpu.on->use_threads(n_threads);
        all.push_back(&cpu);
    }
    return all;
}

std::string location::devices() const {
    std::string names;
    if (std::any_of(host.begin(), host.end(), [](const layer_rows & layer) { return layer.k != nullptr; })) {
        names = "CPU";
    }
    for (const device_part & part : parts) {
        names += (names.empty() ? "" : ", ") + std::string(part.on->name());
    }
    return names;
}

uint64_t location::bytes_transferred() const {
    uint64_t sum = 0;
    for (const device_part & part : parts) {
        sum += part.on->bytes_transferred;
    }
    return sum;
}

bool location::has_room(size_t n) const {
    for (const device_part & part : parts) {
        const size_t row = host[part.layers.front().il].k_row + host[part.layers.front().il].v_row;
        if (part.on->free_memory() < 2 * n * row * part.layers.size()) {
            return false;
        }
    }
    return true;
}

void location::compare(const blob_cache & blob, const std::vector<uint32_t> & order,
                       const std::vector<kvp_cell_index> & cells) const {
    for (size_t il = 0; il < layers.size(); ++il) {
        if (!holds(layers[il], blob.layers[il], order, cells)) {
            fail(KVP_ERR_RUNTIME, "layer %zu: the cells followed do not hold what llama.cpp's state says", il);
        }
    }
}

bool location::begins_with(const blob_cache & blob) const {
    const layer_rows & want = blob.layers.front();
    const size_t       size = blob.pos.size() * want.k_row;
    return size <= ggml_nbytes(layers.front().k) && std::memcmp(bytes_of(layers.front().k, size).data(), want.k, size) == 0;
}

std::vector<float> location::key_norms(const std::vector<uint32_t> & at) {
    const size_t       n = at.size(), H = shape.n_head_kv;
    std::vector<float> norms(n * H);
    if (on_host(0)) {
        std::vector<float> keys(n * H * shape.head_size_k);
        read_k(host[0], at, H * shape.head_size_k, 0, keys.data());
        score_knorm(keys.data(), n, H, shape.head_size_k, norms.data());
        return norms;
    }
    const std::vector<int32_t> cells(at.begin(), at.end());
    device_part &              part = parts.front(); // the first layer that is not on the host is its first
    device_graph               graph(*part.on, 32);
    graph_rows                 rows(graph, part, shape, cells);
    ggml_tensor *              found = graph_knorm(graph.ctx(), rows.stored_keys(0));
    ggml_set_output(found);
    graph.compute(found);
    graph.prepare();
    graph.run();
    part.on->get(found, norms.data(), norms.size() * sizeof(float));
    return norms;
}

} // namespace kvp
