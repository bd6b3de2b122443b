// How the tensors that hold a cache are told in a graph: no public header names them.
#pragma once

#include "ggml.h"

#include <cstdint>

namespace kvp {

// The tensor that a view is a view of; others are their own.
inline const ggml_tensor * root_of(const ggml_tensor * t) { return t && t->view_src ? t->view_src : t; }

// What llama_kv_cache calls the keys and values of a layer (src/llama-kv-cache.cpp); views have other names.
constexpr char KEYS[]   = "cache_k_l";
constexpr char VALUES[] = "cache_v_l";

// The number behind `prefix` in a tensor's name, or -1.
int32_t layer_named(const ggml_tensor * t, const char * prefix);

} // namespace kvp
