#include "log/head_scorer.h"

#include "state/rows.h"

#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace kvp {

head_scorer::head_scorer(const score_job & job)
    : job(job),
      group(job.queries.n_head / job.layout.n_head_kv),
      n_columns(group * job.queries.n_queries),
      head_bytes(job.layout.k_row / job.layout.n_head_kv),
      columns(job.layout.head_size_k * job.width),
      query(job.layout.head_size_k),
      cosine(job.queries.turn ? job.queries.n_pairs : 0),
      sine(cosine.size()),
      last(job.width),
      stored(head_bytes),
      keys(TILE_ROWS * job.layout.head_size_k),
      logits(TILE_ROWS * job.width),
      weights(job.tiles.empty() ? 0 : (job.tiles.back().token + job.tiles.back().n) * job.width),
      factors(job.tiles.size() * job.width),
      largest(job.width),
      sum(job.width),
      unwanted(job.largest && job.mean ? 0 : job.n_tokens) {}

// Columns from number `first` on, as many as there is room for: of each query head all queries, one after the other.
void head_scorer::choose_columns(size_t first) {
    first_column = first;
    n_chosen     = std::min(n_columns - first, job.width);
    width        = (n_chosen + COLUMNS - 1) / COLUMNS * COLUMNS;
    for (size_t c = 0; c < width; ++c) {
        last[c] = c < n_chosen ? job.queries.indices[(first + c) % job.queries.n_queries] : INT32_MAX;
    }
}

// The columns' queries, times the scale. A key that counts as turned by so many positions is multiplied as it is
// stored: its query is turned back instead. The Hadamard rotation is that of the stored keys, so it comes last.
void head_scorer::turn_queries(const double * turn) {
    const kvp_log_queries & from = job.queries;
    const size_t            size = job.layout.head_size_k;
    if (turn) {
        for (size_t p = 0; p < from.n_pairs; ++p) {
            const double angle = *turn * from.frequency[size_t(layer) * from.n_pairs + p];
            cosine[p]          = std::cos(angle);
            sine[p]            = std::sin(angle);
        }
    }
    for (size_t c = 0; c < width; ++c) {
        if (c < n_chosen) {
            const size_t number = first_column + c, of_head = number / from.n_queries, m = number % from.n_queries;
            const float * q = from.queries + ((size_t(layer) * from.n_head + head * group + of_head) * from.n_queries + m) * size;
            std::copy_n(q, size, query.begin());
            for (size_t p = 0; turn && p < from.n_pairs; ++p) {
                float &      a = query[from.neox ? p : 2 * p];
                float &      b = query[from.neox ? p + from.n_pairs : 2 * p + 1];
                const double a1 = a * cosine[p] + b * sine[p], b1 = b * cosine[p] - a * sine[p];
                a = float(a1);
                b = float(b1);
            }
            if (job.layout.k_hadamard_block) {
                hadamard(query.data(), size, job.layout.k_hadamard_block);
            }
        } else {
            std::fill(query.begin(), query.end(), 0.0f);
        }
        for (size_t k = 0; k < size; ++k) {
            columns.get()[k * width + c] = query[k] * from.scale[layer];
        }
    }
}

// Rows may lie at any address; ggml reads a row from where its values may lie.
void head_scorer::read_keys(const tile & at) {
    const kvp_log_layout & layout = job.layout;
    const kvp_log_block &  block  = job.blocks[at.block];
    const auto             type   = ggml_type(layout.type_k);
    const ggml_to_float_t  convert = ggml_get_type_traits(type)->to_float;
    const uint8_t *        row = block.rows + size_t(layer) * block.n * (layout.k_row + layout.v_row) + at.row * layout.k_row + head * head_bytes;
    float *                out = keys.get();
    for (uint32_t i = 0; i < at.n; ++i, row += layout.k_row, out += layout.head_size_k) {
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
        std::fill_n(largest.get(), width, NO_LOGIT);
        std::fill_n(sum.get(), width, 0.0f);
        const double * turned = nullptr;
        for (size_t t = 0; t < job.tiles.size(); ++t) {
            const tile &          tile  = job.tiles[t];
            const kvp_log_block & block = job.blocks[tile.block];
            const double *        turn  = job.queries.turn ? job.queries.turn + tile.block : nullptr;
            if (t == 0 || (turn && *turn != *turned)) {
                turn_queries(turn);
                turned = turn;
            }
            read_keys(tile);
            const kvp_token_index index = block.first + int32_t(tile.row);
            const bool            all   = index + int32_t(tile.n - 1) <= job.queries.indices[0]; // every query sees all
            job.kernel.weigh(keys.get(), tile.n, job.layout.head_size_k, columns.get(), width, all ? nullptr : last.data(), index,
                             logits.get(), weights.get() + tile.token * width, largest.get(), sum.get());
            std::copy_n(largest.get(), width, factors.get() + t * width);
        }
        for (size_t c = 0; c < width; ++c) {
            sum.get()[c] = c < n_chosen && sum.get()[c] > 0 ? 1.0f / sum.get()[c] : 0.0f;
        }
        for (size_t t = 0; t < job.tiles.size(); ++t) {
            const tile & tile = job.tiles[t];
            job.kernel.reduce(weights.get() + tile.token * width, tile.n, width, largest.get(), sum.get(), factors.get() + t * width,
                              highest + tile.token, mean + tile.token);
        }
    }
    if (job.mean) {
        for (size_t i = 0; i < job.n_tokens; ++i) {
            mean[i] /= float(n_columns);
        }
    }
}

} // namespace kvp
