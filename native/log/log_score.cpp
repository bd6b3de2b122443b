#include "error.h"
#include "kvp_edge.h"
#include "log/head_scorer.h"

#include "ggml.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <system_error>
#include <thread>
#include <vector>

namespace kvp {

namespace {

constexpr uint64_t MOST = std::numeric_limits<size_t>::max() / 2; // bytes

// Weights of one thread: as many columns at once as fit, within limits. More than a few hundred are no
// faster. Fewer bytes are slower: keys are read again for every part of the columns.
constexpr size_t MOST_WEIGHT_BYTES = size_t(32) << 20;
constexpr size_t LEAST_COLUMNS     = 2 * COLUMNS;
constexpr size_t MOST_COLUMNS      = 512;

// a * b, unless it is more than `most`.
uint64_t product(uint64_t a, uint64_t b, const char * of, uint64_t most = MOST) {
    if (b != 0 && a > most / b) {
        fail(KVP_ERR_ARGUMENT, "%s are more than memory can hold: %llu times %llu", of, (unsigned long long) a, (unsigned long long) b);
    }
    return a * b;
}

void check(const kvp_log_layout & l) {
    if (l.n_layer == 0 || l.n_layer > KVP_MAX_LAYERS || l.n_head_kv == 0 || l.head_size_k == 0) {
        fail(KVP_ERR_ARGUMENT, "a log of %u layers x %u KV heads x %u values is not possible", l.n_layer, l.n_head_kv, l.head_size_k);
    }
    if (l.type_k < 0 || l.type_k >= GGML_TYPE_COUNT || ggml_blck_size(ggml_type(l.type_k)) == 0) {
        fail(KVP_ERR_ARGUMENT, "the log's keys are of type %d, which is no type of ggml", l.type_k);
    }
    const auto type = ggml_type(l.type_k);
    if (type != GGML_TYPE_F32 && !ggml_get_type_traits(type)->to_float) {
        fail(KVP_ERR_UNSUPPORTED, "keys of type %s cannot be multiplied", ggml_type_name(type));
    }
    if (l.head_size_k % ggml_blck_size(type) != 0) {
        fail(KVP_ERR_UNSUPPORTED, "a head of %u values is no whole number of blocks of type %s", l.head_size_k, ggml_type_name(type));
    }
    const uint64_t row = product(l.n_head_kv, ggml_row_size(type, l.head_size_k), "a token's keys");
    if (l.k_row != row) {
        fail(KVP_ERR_ARGUMENT, "a row of K has %llu bytes, but %u heads of %u values of type %s make %llu", (unsigned long long) l.k_row,
             l.n_head_kv, l.head_size_k, ggml_type_name(type), (unsigned long long) row);
    }
    if (l.v_row > MOST - row || product(l.n_layer, row + l.v_row, "a token's rows") != l.bytes_per_token) {
        fail(KVP_ERR_ARGUMENT, "a token has %llu bytes, but %u layers of %llu and %llu bytes do not make that",
             (unsigned long long) l.bytes_per_token, l.n_layer, (unsigned long long) l.k_row, (unsigned long long) l.v_row);
    }
    const uint32_t h = l.k_hadamard_block;
    if (h != 0 && ((h & (h - 1)) != 0 || l.head_size_k % h != 0)) {
        fail(KVP_ERR_ARGUMENT, "Hadamard blocks of %u values do not divide a head of %u, or are no power of two", h, l.head_size_k);
    }
}

// Returns the number of all blocks' tokens.
size_t check(const kvp_log_layout & layout, const kvp_log_block * blocks, uint32_t n_blocks) {
    if (n_blocks > 0 && !blocks) {
        fail(KVP_ERR_ARGUMENT, "kvp_log_score: blocks must not be NULL");
    }
    uint64_t n = 0;
    int64_t  next = 0;
    for (uint32_t b = 0; b < n_blocks; ++b) {
        const kvp_log_block & block = blocks[b];
        const int64_t         end   = int64_t(block.first) + block.n;
        if (block.first < next || end > int64_t(INT32_MAX) + 1) {
            fail(KVP_ERR_ARGUMENT, "block %u holds tokens %d to %lld, but must begin at %lld or later and end by %d", b, block.first,
                 (long long) end - 1, (long long) next, INT32_MAX);
        }
        if (block.n > 0 && !block.rows) {
            fail(KVP_ERR_ARGUMENT, "block %u has %u tokens, but no rows", b, block.n);
        }
        product(block.n, layout.bytes_per_token, "a block's rows");
        n += block.n;
        next = end;
    }
    product(product(layout.n_layer, layout.n_head_kv, "scores"), n * sizeof(float), "scores");
    return size_t(n);
}

void check(const kvp_log_queries & q, const kvp_log_layout & layout, uint32_t n_blocks) {
    if (q.n_head == 0 || q.n_head % layout.n_head_kv != 0) {
        fail(KVP_ERR_ARGUMENT, "%u query heads do not divide among %u KV heads", q.n_head, layout.n_head_kv);
    }
    if (q.n_queries == 0) {
        return;
    }
    if (!q.queries || !q.indices || !q.scale) {
        fail(KVP_ERR_ARGUMENT, "kvp_log_score: queries, their indices and scale must not be NULL");
    }
    product(product(q.n_head, q.n_queries, "queries"), uint64_t(layout.head_size_k) * layout.n_layer * sizeof(float), "queries");
    for (uint32_t i = 0; i < q.n_queries; ++i) {
        if (q.indices[i] < 0 || (i > 0 && q.indices[i] <= q.indices[i - 1])) {
            fail(KVP_ERR_ARGUMENT, "the queries' indices must ascend from 0 or more, but entry %u is %d", i, q.indices[i]);
        }
    }
    for (uint32_t il = 0; il < layout.n_layer; ++il) {
        if (!std::isfinite(q.scale[il])) {
            fail(KVP_ERR_ARGUMENT, "the scale of layer %u is %g", il, double(q.scale[il]));
        }
    }
    if (!q.turn || n_blocks == 0) {
        return;
    }
    if (!q.frequency || q.n_pairs == 0 || q.n_pairs > layout.head_size_k / 2 || q.neox > 1) {
        fail(KVP_ERR_ARGUMENT, "keys of %u values cannot be turned by %u pairs (neox %u) with %s", layout.head_size_k, q.n_pairs, q.neox,
             q.frequency ? "these frequencies" : "no frequencies");
    }
    for (uint32_t b = 0; b < n_blocks; ++b) {
        if (!std::isfinite(q.turn[b])) {
            fail(KVP_ERR_ARGUMENT, "block %u is turned by %g positions", b, q.turn[b]);
        }
    }
    for (size_t i = 0; i < size_t(layout.n_layer) * q.n_pairs; ++i) {
        if (!std::isfinite(q.frequency[i])) {
            fail(KVP_ERR_ARGUMENT, "frequency number %zu is %g", i, q.frequency[i]);
        }
    }
}

// The tokens up to number `last` of the conversation.
std::vector<log_tile> tiles_of(const kvp_log_block * blocks, uint32_t n_blocks, kvp_token_index last) {
    std::vector<log_tile> tiles;
    size_t                token = 0;
    for (uint32_t b = 0; b < n_blocks && blocks[b].first <= last; ++b) {
        const auto seen = uint32_t(std::min<int64_t>(blocks[b].n, int64_t(last) - blocks[b].first + 1));
        for (uint32_t row = 0; row < seen; row += TILE_ROWS) {
            tiles.push_back({ b, row, std::min(TILE_ROWS, seen - row), token + row });
        }
        token += blocks[b].n;
    }
    return tiles;
}

// Columns at once: parts of about the same size.
size_t width_for(size_t n_columns, const std::vector<log_tile> & tiles) {
    const size_t n_seen = tiles.back().token + tiles.back().n;
    const size_t most   = std::clamp(MOST_WEIGHT_BYTES / ((n_seen + tiles.size()) * sizeof(float)), LEAST_COLUMNS, MOST_COLUMNS) / COLUMNS;
    const size_t all    = (n_columns + COLUMNS - 1) / COLUMNS;
    const size_t parts  = (all + most - 1) / most;
    return (all + parts - 1) / parts * COLUMNS;
}

// Every (layer, KV head) is one piece of work, taken by whichever thread is free.
void run(const score_job & job, size_t n_threads) {
    const size_t H = job.layout.n_head_kv, n = job.layout.n_layer * H;

    std::vector<std::unique_ptr<head_scorer>> scorers;
    for (size_t i = 0; i < std::min(n_threads, n); ++i) {
        scorers.push_back(std::make_unique<head_scorer>(job));
    }
    std::atomic<size_t> next{ 0 };
    const auto          work = [&](head_scorer & scorer) {
        for (size_t i = next++; i < n; i = next++) {
            scorer.score(uint32_t(i / H), uint32_t(i % H));
        }
    };
    std::vector<std::thread> others;
    others.reserve(scorers.size());
    for (size_t i = 1; i < scorers.size(); ++i) {
        try {
            others.emplace_back(work, std::ref(*scorers[i]));
        } catch (const std::system_error &) {
            break; // no more threads can be had: those there are do it
        }
    }
    work(*scorers[0]);
    for (std::thread & other : others) {
        other.join();
    }
}

} // namespace

} // namespace kvp

int32_t kvp_log_score(const kvp_log_layout * layout, const kvp_log_block * blocks, uint32_t n_blocks, const kvp_log_queries * queries,
                      int32_t n_threads, float * largest, float * mean, kvp_error * err) {
    using namespace kvp;
    return guard(err, [&] {
        if (!layout || !queries) {
            fail(KVP_ERR_ARGUMENT, "kvp_log_score: layout and queries must not be NULL");
        }
        if (n_threads < 1) {
            fail(KVP_ERR_ARGUMENT, "%d threads cannot score a log", n_threads);
        }
        check(*layout);
        const size_t n = check(*layout, blocks, n_blocks);
        check(*queries, *layout, n_blocks);
        for (float * result : { largest, mean }) {
            if (result) {
                std::fill_n(result, size_t(layout->n_layer) * layout->n_head_kv * n, 0.0f);
            }
        }
        if (queries->n_queries == 0 || (!largest && !mean)) {
            return;
        }
        auto tiles = tiles_of(blocks, n_blocks, queries->indices[queries->n_queries - 1]);
        if (tiles.empty()) {
            return;
        }
        const size_t n_columns = size_t(queries->n_head / layout->n_head_kv) * queries->n_queries;
        const size_t width     = width_for(n_columns, tiles);
        run({ *layout, blocks, *queries, std::move(tiles), n, width, *attention_kernels()[0], largest, mean }, size_t(n_threads));
    });
}
