// Which cell of the cache the token at a position lies in, as far as it is known.
#pragma once

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
    void append(int32_t first, uint32_t n, const std::vector<int64_t> & cells);

    // Forgets positions [p0, p1).
    void remove(int32_t p0, int32_t p1);

    // The cell at `from[i]` is now called `to[i]`; both ascend.
    void rename(const int32_t * from, const int32_t * to, uint32_t n);

    // Position positions[i] lies in cell cells[i], and nothing else is held.
    void assign(const int32_t * positions, const std::vector<uint32_t> & cells);

    // The positions in [p0, p1) whose cells are known, ascending.
    std::vector<int32_t> positions(int32_t p0, int32_t p1) const;

    // Their cells; empty if one is unknown, or two are said to lie in one.
    std::vector<uint32_t> find(const int32_t * positions, uint32_t n) const;

private:
    int32_t at(int32_t position) const {
        return position >= 0 && std::size_t(position) < cell_at.size() ? cell_at[std::size_t(position)] : UNKNOWN;
    }

    std::vector<int32_t> cell_at; // [newest position + 1]
};

} // namespace kvp
