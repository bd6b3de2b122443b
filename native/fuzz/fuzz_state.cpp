// Fuzz target: any bytes as a state blob of llama.cpp, parsed and packed by any plan.
//
// Input: 8 bytes that choose a plan, then the blob. scripts/fuzz.py makes inputs of real blobs, builds
// this with AddressSanitizer and UndefinedBehaviorSanitizer, and runs it: with clang under libFuzzer,
// else with the small mutating main() below (-DKVP_FUZZ_MAIN).
#include "error.h"
#include "state/pack_state.h"
#include "state/state_blob.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

constexpr size_t PLAN_BYTES = 8;

uint32_t next(uint32_t & state) { // xorshift32 (Marsaglia 2003)
    state ^= state << 13;
    state ^= state >> 17;
    state ^= state << 5;
    return state;
}

void require(bool holds, const char * what) {
    if (!holds) {
        std::fprintf(stderr, "fuzz_state: %s\n", what);
        std::abort();
    }
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    if (size < PLAN_BYTES) {
        return 0;
    }
    uint32_t random;
    std::memcpy(&random, data, sizeof(random));
    random |= 1;
    const bool sound = data[4] % 8 != 0; // else rows and positions are any numbers

    // a heap block of the exact size, so that a byte beyond it is seen
    std::vector<uint8_t> blob(data + PLAN_BYTES, data + size);
    try {
        const kvp::state_blob before = kvp::parse_state_blob(blob.data(), blob.size(), 0);
        const kvp::blob_cache & base = before.base;
        require(base.pos.size() <= blob.size() && base.layers.size() <= KVP_MAX_LAYERS, "more was believed than there is");

        kvp::pack_plan plan;
        plan.n_layer   = uint32_t(base.layers.size());
        plan.n_head_kv = 1 + data[5] % 8;
        plan.n         = uint32_t(base.pos.size());
        plan.n_keep    = plan.n ? 1 + next(random) % plan.n : 0;
        std::vector<int32_t> present = base.pos, positions(plan.n_keep);
        std::sort(present.begin(), present.end());
        std::vector<int32_t> keep, rows(plan.n);
        for (uint32_t g = 0; g < plan.n_layer * plan.n_head_kv && keep.size() < (1u << 20); ++g) {
            for (uint32_t i = 0; i < plan.n; ++i) {
                rows[i] = int32_t(i);
            }
            for (uint32_t i = 0; i < plan.n_keep; ++i) {
                std::swap(rows[i], rows[i + next(random) % (plan.n - i)]);
                keep.push_back(sound ? rows[i] : int32_t(next(random)) >> (next(random) % 32));
            }
        }
        keep.resize(size_t(plan.n_layer) * plan.n_head_kv * plan.n_keep);
        for (uint32_t i = 0; i < plan.n_keep; ++i) {
            positions[i] = sound ? int32_t(i) : int32_t(next(random));
        }
        plan.present   = present.data();
        plan.keep      = keep.data();
        plan.positions = positions.data();

        std::vector<double>  frequency;
        std::vector<int32_t> distance;
        if (data[6] & 1) {
            plan.shift.n_pairs = 1 + next(random) % 64;
            frequency.assign(size_t(plan.n_layer) * plan.shift.n_pairs, 0.01);
            distance.resize(keep.size());
            for (int32_t & d : distance) {
                d = int32_t(next(random)) >> (next(random) % 32);
            }
            plan.shift.frequency = frequency.data();
            plan.shift.distance      = distance.data();
            plan.shift.neox      = data[6] & 2;
            plan.shift.hadamard_block = data[6] & 4 ? 64 : 0;
        }

        const size_t packed = kvp::pack_state(blob.data(), blob.size(), 0, plan);
        require(packed <= blob.size(), "packing made the blob longer");
        const kvp::state_blob after = kvp::parse_state_blob(blob.data(), packed, 0);
        require(after.base.pos == positions && after.base.layers.size() == base.layers.size() &&
                    after.has_window == before.has_window && after.window.pos == before.window.pos,
                "a packed blob does not say what it was packed to");
    } catch (const kvp::error & e) {
        require(!e.message.empty(), "an error without a sentence");
    }
    return 0;
}

#ifdef KVP_FUZZ_MAIN

// fuzz_state SECONDS FILE...: mutates the files' bytes, the same way in every run.
#    include <chrono>
#    include <fstream>
#    include <iterator>

int main(int argc, char ** argv) {
    std::vector<std::vector<uint8_t>> corpus;
    for (int i = 2; i < argc; ++i) {
        std::ifstream file(argv[i], std::ios::binary);
        corpus.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    }
    if (argc < 3) {
        std::fprintf(stderr, "usage: fuzz_state SECONDS FILE...\n");
        return 2;
    }
    const auto end    = std::chrono::steady_clock::now() + std::chrono::seconds(std::atoi(argv[1]));
    uint32_t   random = 1;
    size_t     n_runs = 0;
    for (const auto & input : corpus) {
        LLVMFuzzerTestOneInput(input.data(), input.size());
    }
    for (; std::chrono::steady_clock::now() < end; ++n_runs) {
        std::vector<uint8_t> input = corpus[next(random) % corpus.size()];
        if (input.empty()) {
            continue;
        }
        for (uint32_t n = 1 + next(random) % 4; n > 0; --n) {
            // counts and types lie at the front, so half of the changes do, too
            const size_t reach = next(random) % 2 ? std::min<size_t>(input.size(), 256) : input.size();
            const size_t at    = next(random) % reach;
            switch (next(random) % 5) {
                case 0: input[at] ^= uint8_t(1u << next(random) % 8); break;
                case 1: input[at] = uint8_t(next(random)); break;
                case 2: input[at] = next(random) % 2 ? 0xff : 0x00; break;
                case 3: input.resize(at + 1); break;
                default: {
                    const size_t from = next(random) % input.size(), length = std::min<size_t>(next(random) % 16, input.size() - from);
                    const std::vector<uint8_t> piece(input.begin() + from, input.begin() + from + length);
                    input.insert(input.begin() + at, piece.begin(), piece.end());
                }
            }
        }
        LLVMFuzzerTestOneInput(input.data(), input.size());
    }
    std::printf("%zu inputs, nothing broke\n", n_runs);
    return 0;
}

#endif
