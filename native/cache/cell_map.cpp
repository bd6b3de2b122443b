#include "cache/cell_map.h"

#include <algorithm>

namespace kvp {

void cell_map::append(kvp_llama_position first, uint32_t n, const std::vector<int64_t> & cells) {
    cell_at.resize(size_t(first), UNKNOWN);
    if (cells.size() == n) {
        cell_at.insert(cell_at.end(), cells.begin(), cells.end());
    } else {
        cell_at.resize(size_t(first) + n, UNKNOWN);
    }
}

void cell_map::remove(kvp_llama_position p0, kvp_llama_position p1) {
    const auto end = std::min(size_t(std::max(p1, 0)), cell_at.size());
    for (size_t p = size_t(std::max(p0, 0)); p < end; ++p) {
        cell_at[p] = UNKNOWN;
    }
}

void cell_map::rename(const kvp_llama_position * from, const kvp_llama_position * to, uint32_t n) {
    std::vector<int32_t> cells(n);
    for (uint32_t i = 0; i < n; ++i) {
        cells[i] = at(from[i]);
    }
    cell_at.assign(n ? size_t(to[n - 1]) + 1 : 0, UNKNOWN);
    for (uint32_t i = 0; i < n; ++i) {
        cell_at[size_t(to[i])] = cells[i];
    }
}

void cell_map::assign(const kvp_llama_position * positions, const std::vector<kvp_cell_index> & cells) {
    cell_at.assign(cells.empty() ? 0 : size_t(*std::max_element(positions, positions + cells.size())) + 1, UNKNOWN);
    for (size_t i = 0; i < cells.size(); ++i) {
        cell_at[size_t(positions[i])] = int32_t(cells[i]);
    }
}

std::vector<kvp_llama_position> cell_map::positions(kvp_llama_position p0, kvp_llama_position p1) const {
    std::vector<int32_t> found;
    for (int32_t p = std::max(p0, 0); p < p1 && size_t(p) < cell_at.size(); ++p) {
        if (cell_at[size_t(p)] != UNKNOWN) {
            found.push_back(p);
        }
    }
    return found;
}

std::vector<kvp_cell_index> cell_map::find(const kvp_llama_position * positions, uint32_t n) const {
    std::vector<kvp_cell_index> cells(n);
    for (uint32_t i = 0; i < n; ++i) {
        const int32_t cell = at(positions[i]);
        if (cell == UNKNOWN) {
            return {};
        }
        cells[i] = uint32_t(cell);
    }
    std::vector<bool> taken(n ? *std::max_element(cells.begin(), cells.end()) + 1 : 0);
    for (const uint32_t cell : cells) {
        if (taken[cell]) {
            return {};
        }
        taken[cell] = true;
    }
    return cells;
}

} // namespace kvp
