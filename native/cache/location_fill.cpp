// Filling a cache where it lies in host memory: heads' rows are written to the cells whose rows change.
#include "cache/location.h"

#include "state/slices.h"

#include <algorithm>
#include <cstring>

namespace kvp {

namespace {

// Slices from[which[i]] -> rows of table[cells[which[i]]]. All are read before one is written: some may lie in cells
// that are written to.
void write_slices(const slice_at * from, const std::vector<uint32_t> & which, const std::vector<kvp_cell_index> & cells, uint8_t * table,
                  size_t row, size_t slice_bytes, uint8_t * scratch) {
    with_slice_size(slice_bytes, [&](auto slice) {
        for (size_t i = 0; i < which.size(); ++i) {
            std::memcpy(scratch + i * slice, from[which[i]].at, slice);
        }
        for (size_t i = 0; i < which.size(); ++i) {
            std::memcpy(table + cells[which[i]] * row, scratch + i * slice, slice);
        }
    });
}

// The same for transposed V, value by value of `T`'s size; columns hold nothing of each other.
template <typename T>
void write_columns(const slice_at * from, const std::vector<uint32_t> & which, const std::vector<kvp_cell_index> & cells,
                   uint8_t * columns, size_t column, size_t n_column, uint8_t * scratch) {
    for (size_t j = 0; j < n_column; ++j, columns += column) {
        for (size_t i = 0; i < which.size(); ++i) {
            std::memcpy(scratch + i * sizeof(T), from[which[i]].at + j * from[which[i]].step, sizeof(T));
        }
        for (size_t i = 0; i < which.size(); ++i) {
            std::memcpy(columns + cells[which[i]] * sizeof(T), scratch + i * sizeof(T), sizeof(T));
        }
    }
}

} // namespace

void location::fill(const fill_plan & plan, fill_sources & sources, const std::vector<kvp_cell_index> & cells) {
    const size_t          n_head = shape.n_head_kv, n = plan.n_new;
    size_t                largest = 0; // bytes of a head
    for (const layer_rows & layer : host) {
        largest = std::max({ largest, layer.k_row / n_head, layer.v_row / n_head });
    }
    std::vector<uint8_t>  scratch(n * largest);
    std::vector<uint32_t> which;
    which.reserve(n);
    const auto changed = [&](size_t il, size_t h) -> const std::vector<uint32_t> & {
        const int32_t * source = plan.source + (il * n_head + h) * n;
        which.clear();
        for (uint32_t i = 0; i < n; ++i) {
            if (source[i] < 0 || uint32_t(source[i]) != i) {
                which.push_back(i);
            }
        }
        return which;
    };
    for (uint32_t il = 0; il < host.size(); ++il) {
        const layer_rows & layer = host[il];
        auto *             k     = const_cast<uint8_t *>(layer.k);
        auto *             v     = const_cast<uint8_t *>(layer.v);
        const size_t       slice_k = layer.k_row / n_head, slice_v = layer.v_row / n_head;
        const slice_at *   keys = sources.slices(side::k, il, layer, cells).data();
        for (size_t h = 0; h < n_head; ++h) {
            write_slices(keys + h * n, changed(il, h), cells, k + h * slice_k, layer.k_row, slice_k, scratch.data());
        }
        const slice_at * values = sources.slices(side::v, il, layer, cells).data();
        for (size_t h = 0; h < n_head; ++h) {
            changed(il, h);
            if (!shape.v_transposed) {
                write_slices(values + h * n, which, cells, v + h * slice_v, layer.v_row, slice_v, scratch.data());
                continue;
            }
            const size_t value = ggml_type_size(layer.type_v), n_column = slice_v / value; // 2 or 4 bytes, as this class requires
            uint8_t *    columns = v + h * n_column * layer.v_column;
            if (value == sizeof(uint16_t)) {
                write_columns<uint16_t>(values + h * n, which, cells, columns, layer.v_column, n_column, scratch.data());
            } else {
                write_columns<uint32_t>(values + h * n, which, cells, columns, layer.v_column, n_column, scratch.data());
            }
        }
    }
}

} // namespace kvp
