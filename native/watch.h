// What llama.cpp shows of a context's cache while it computes: the tensors that hold it, and the cell that
// every new token goes to. Public headers name neither; the nodes that store keys and values do.
#pragma once

#include "kvp_edge.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <cstdint>
#include <map>
#include <vector>

namespace kvp {

// The tensor that a view is a view of; others are their own.
inline const ggml_tensor * root_of(const ggml_tensor * t) { return t && t->view_src ? t->view_src : t; }

// What llama_kv_cache calls the keys and values of a layer (src/llama-kv-cache.cpp); views have other names.
constexpr char KEYS[]   = "cache_k_l";
constexpr char VALUES[] = "cache_v_l";

// The number behind `prefix` in a tensor's name, or -1.
int32_t layer_named(const ggml_tensor * t, const char * prefix);

// One layer's cache, and the cells that were written to since the watch was told to look.
struct seen_cache {
    const ggml_tensor *  k = nullptr;
    const ggml_tensor *  v = nullptr;
    std::vector<int64_t> cells;
};

} // namespace kvp

struct kvp_watch {
    kvp_eval_callback next      = nullptr; // sees every node, too
    void *            next_data = nullptr;

    static constexpr int32_t NONE = -1, ALL = -2; // in place of a layer

    // Looks at all layers from now on.
    void look();
    // What was seen, by layer number in the model. From now on only the cells of layer `il` are followed, or
    // of NONE.
    std::map<int32_t, kvp::seen_cache> follow(int32_t il);
    // The cells of the newest n tokens, or nothing if they were not all seen; forgets what came before.
    std::vector<int64_t> take(size_t n);

    void see(const ggml_tensor * node);

private:
    int32_t                            followed = NONE;
    std::map<int32_t, kvp::seen_cache> seen;
};
