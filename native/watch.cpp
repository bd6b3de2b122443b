// kvp_watch: a callback that never stops a graph.
#include "watch.h"

#include "error.h"

#include <cstdlib>
#include <cstring>
#include <utility>

namespace kvp {

int32_t layer_named(const ggml_tensor * t, const char * prefix) {
    const size_t n = std::strlen(prefix);
    return t && std::strncmp(t->name, prefix, n) == 0 ? std::atoi(t->name + n) : -1;
}

} // namespace kvp

using namespace kvp;

void kvp_watch::look() {
    seen.clear();
    followed = ALL;
}

std::map<int32_t, seen_cache> kvp_watch::follow(int32_t il) {
    followed = il;
    return std::exchange(seen, {});
}

std::vector<int64_t> kvp_watch::take(size_t n) {
    std::vector<int64_t> cells = std::exchange(seen[followed].cells, {});
    if (cells.size() < n) {
        return {};
    }
    cells.erase(cells.begin(), cells.end() - std::ptrdiff_t(n));
    return cells;
}

// llama_kv_cache::cpy_k and cpy_v: ggml_set_rows(cache, new rows, cells). With V transposed the indices are
// those of single values, so cells are taken where keys are stored; both go to the same ones.
void kvp_watch::see(const ggml_tensor * node) {
    if (node->op != GGML_OP_SET_ROWS || followed == NONE) {
        return;
    }
    const ggml_tensor * cache = root_of(node);
    if (const int32_t il = layer_named(cache, KEYS); il >= 0 && (followed == ALL || followed == il)) {
        seen_cache &        layer = seen[il];
        const ggml_tensor * index = node->src[1];
        const size_t        had = layer.cells.size(), n = size_t(ggml_nelements(index));
        layer.k                 = cache;
        if (index->type != GGML_TYPE_I64 || had + n > size_t(cache->ne[1])) {
            layer.cells.clear(); // nobody takes them: more than the cache has cells
        }
        if (index->type == GGML_TYPE_I64) {
            layer.cells.resize(layer.cells.size() + n);
            ggml_backend_tensor_get(index, &*(layer.cells.end() - std::ptrdiff_t(n)), 0, n * sizeof(int64_t));
        }
    } else if (followed == ALL) {
        if (const int32_t iv = layer_named(cache, VALUES); iv >= 0) {
            seen[iv].v = cache;
        }
    }
}

namespace {

bool on_node(ggml_tensor * node, bool ask, void * user_data) {
    auto & watch = *static_cast<kvp_watch *>(user_data);
    if (ask) {
        try {
            watch.see(node);
        } catch (const std::bad_alloc &) {
            // cells that are missing are found to be missing when they are taken
        }
        return watch.next && watch.next(node, true, watch.next_data);
    }
    return watch.next(node, false, watch.next_data); // asked for by nobody else
}

} // namespace

extern "C" {

int32_t kvp_watch_create(kvp_eval_callback next, void * next_data, kvp_watch ** watch, kvp_error * err) {
    return guard(err, [&] {
        if (!watch) {
            fail(KVP_ERR_ARGUMENT, "kvp_watch_create: watch must not be NULL");
        }
        *watch              = new kvp_watch{};
        (*watch)->next      = next;
        (*watch)->next_data = next_data;
    });
}

void kvp_watch_free(kvp_watch * watch) { delete watch; }

kvp_eval_callback kvp_watch_callback(void) { return on_node; }

} // extern "C"
