// Which cell of the cache the token at a position lies in, as far as it is known.
#pragma once

#include "kvp_edge.h"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvp {

class cell_map {
public:
    static constexpr int32_t UNKNOWN = -1;

    void clear() { cell_at.clear(); }

    // The newest tokens are at first, first + 1, ... and lie in `cells`; what was at these positions or
    // behind them is gone. With no cells given for n tokens, theirs are unknown.
    void append(kvp_llama_position first, uint32_t n, const std::vector<int64_t> & cells);

    // Forgets positions [p0, p1).
    void remove(kvp_llama_position p0, kvp_llama_position p1);

    // The cell at `from[i]` is now called `to[i]`; both ascend.
    void rename(const kvp_llama_position * from, const kvp_llama_position * to, uint32_t n);

    // Position positions[i] lies in cell cells[i], and nothing else is held.
    void assign(const kvp_llama_position * positions, const std::vector<kvp_cell_index> & cells);

    // The positions in [p0, p1) whose cells are known, ascending.
    std::vector<kvp_llama_position> positions(kvp_llama_position p0, kvp_llama_position p1) const;

    // Their cells; empty if one is unknown, or two are said to lie in one.
    std::vector<kvp_cell_index> find(const kvp_llama_position * positions, uint32_t n) const;

private:
    int32_t at(int32_t position) const {
        return position >= 0 && std::size_t(position) < cell_at.size() ? cell_at[std::size_t(position)] : UNKNOWN;
    }

    std::vector<int32_t> cell_at; // [newest position + 1]
};

} // namespace kvp
