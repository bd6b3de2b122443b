#include "log/head_scorer.h"

#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace kvp {

namespace {

// hadamard() of state/rows.h for every column of y [n, width].
void hadamard_of_columns(float * y, size_t n, size_t width, uint32_t block) {
    const float scale = 1.0f / std::sqrt(float(block));
    for (size_t half = 1; half < block; half *= 2) {
        for (size_t i = 0; i < n; i += 2 * half) {
            for (size_t j = i * width; j < (i + half) * width; ++j) {
                const float lo = y[j], hi = y[j + half * width];
                y[j]                = lo + hi;
                y[j + half * width] = lo - hi;
            }
        }
    }
    for (size_t j = 0; j < n * width; ++j) {
        y[j] *= scale;
    }
}

} // namespace

head_scorer::head_scorer(const score_job & job)
    : job(job),
      group(job.queries.n_head / job.layout.n_head_kv),
      n_columns(group * job.queries.n_queries),
      head_bytes(job.layout.k_row / job.layout.n_head_kv),
      chosen(job.layout.head_size_k * job.width),
      columns(job.layout.head_size_k * job.width),
      last(job.width),
      stored(head_bytes),
      keys(TILE_ROWS * job.layout.head_size_k),
      logits(TILE_ROWS * job.width),
      weights((job.tiles.back().token + job.tiles.back().n) * job.width),
      factors(job.tiles.size() * job.width),
      largest(job.width),
      sum(job.width),
      unwanted(job.largest && job.mean ? 0 : job.n_tokens) {}

// Columns from number `first` on, as many as there is room for: of each query head all queries, one after the other.
void head_scorer::choose_columns(size_t first) {
    const kvp_log_queries & from = job.queries;
    const size_t            size = job.layout.head_size_k;
    n_chosen                     = std::min(n_columns - first, job.width);
    width                        = (n_chosen + COLUMNS - 1) / COLUMNS * COLUMNS;
    for (size_t c = 0; c < width; ++c) {
        const size_t of_head = (first + c) / from.n_queries, m = (first + c) % from.n_queries;
        const bool   filling = c >= n_chosen;
        const size_t at      = (size_t(layer) * from.n_head + head * group + of_head) * from.n_queries + m;
        last[c]              = filling ? INT32_MAX : from.indices[m];
        for (size_t k = 0; k < size; ++k) {
            chosen[k * width + c] = filling ? 0.0f : from.queries[at * size + k] * from.scale[layer];
        }
    }
}

// A key that counts as turned by so many positions is multiplied as it is stored: the queries are turned back instead.
// The Hadamard rotation is that of the stored keys, so it comes last.
void head_scorer::turn_columns(const double * turn) {
    const kvp_log_queries & how  = job.queries;
    const size_t            size = job.layout.head_size_k;
    std::copy_n(&chosen[0], size * width, &columns[0]);
    for (size_t p = 0; turn && p < how.n_pairs; ++p) {
        const double angle = *turn * how.frequency[size_t(layer) * how.n_pairs + p];
        const float  cos = float(std::cos(angle)), sin = float(std::sin(angle));
        float *      a = columns + (how.neox ? p : 2 * p) * width;
        float *      b = columns + (how.neox ? p + how.n_pairs : 2 * p + 1) * width;
        for (size_t c = 0; c < width; ++c) {
            const float before = a[c];
            a[c]               = before * cos + b[c] * sin;
            b[c]               = b[c] * cos - before * sin;
        }
    }
    if (job.layout.k_hadamard_block) {
        hadamard_of_columns(columns, size, width, job.layout.k_hadamard_block);
    }
}

// Rows may lie at any address; ggml reads a row from where its values may lie.
void head_scorer::read_keys(const log_tile & tile) {
    const kvp_log_layout & layout  = job.layout;
    const kvp_log_block &  block   = job.blocks[tile.block];
    const auto             type    = ggml_type(layout.type_k);
    const ggml_to_float_t  convert = ggml_get_type_traits(type)->to_float;
    const uint8_t *        row     = block.rows + size_t(layer) * block.n * (layout.k_row + layout.v_row) + tile.row * layout.k_row + head * head_bytes;
    float *                out     = keys;
    for (uint32_t i = 0; i < tile.n; ++i, row += layout.k_row, out += layout.head_size_k) {
        if (type == GGML_TYPE_F32) {
            std::memcpy(out, row, head_bytes);
        } else if (type == GGML_TYPE_F16) {
            job.kernel.from_halves(row, layout.head_size_k, out);
        } else {
            std::memcpy(stored.data(), row, head_bytes);
            convert(stored.data(), out, int64_t(layout.head_size_k));
        }
    }
}

void head_scorer::score(uint32_t of_layer, uint32_t of_head) noexcept {
    layer = of_layer;
    head  = of_head;
    const size_t at      = (size_t(layer) * job.layout.n_head_kv + head) * job.n_tokens;
    float *      highest = job.largest ? job.largest + at : unwanted.data();
    float *      mean    = job.mean ? job.mean + at : unwanted.data();
    for (size_t first = 0; first < n_columns; first += job.width) {
        choose_columns(first);
        std::fill_n(&largest[0], width, NO_LOGIT);
        std::fill_n(&sum[0], width, 0.0f);
        const double * turned = nullptr;
        for (size_t t = 0; t < job.tiles.size(); ++t) {
            const log_tile &      tile  = job.tiles[t];
            const kvp_log_block & block = job.blocks[tile.block];
            const double *        turn  = job.queries.turn ? job.queries.turn + tile.block : nullptr;
            if (t == 0 || (turn && *turn != *turned)) {
                turn_columns(turn);
                turned = turn;
            }
            read_keys(tile);
            const kvp_token_index index    = block.first + int32_t(tile.row);
            const bool            all_seen = index + int32_t(tile.n - 1) <= job.queries.indices[0];
            job.kernel.weigh(keys, tile.n, job.layout.head_size_k, columns, width, all_seen ? nullptr : last.data(), index, logits,
                             weights + tile.token * width, largest, sum);
            std::copy_n(&largest[0], width, factors + t * width);
        }
        for (size_t c = 0; c < width; ++c) {
            sum[c] = c < n_chosen && sum[c] > 0 ? 1.0f / sum[c] : 0.0f;
        }
        for (size_t t = 0; t < job.tiles.size(); ++t) {
            const log_tile & tile = job.tiles[t];
            job.kernel.reduce(weights + tile.token * width, tile.n, width, largest, sum, factors + t * width, highest + tile.token,
                              mean + tile.token);
        }
    }
    if (job.mean) {
        for (size_t i = 0; i < job.n_tokens; ++i) {
            mean[i] /= float(n_columns);
        }
    }
}

} // namespace kvp
