#include "observe/cell_watcher.h"

#include "observe/cache_nodes.h"

#include "ggml-backend.h"

#include <utility>

namespace kvp {

void cell_watcher::follow_all() {
    take_failure();
    seen.clear();
    followed = ALL;
}

std::map<int32_t, seen_cache> cell_watcher::follow(int32_t il) {
    followed = il;
    return std::exchange(seen, {});
}

std::vector<int64_t> cell_watcher::take(size_t n) {
    std::vector<int64_t> cells = std::exchange(seen[followed].cells, {});
    if (take_failure() || cells.size() < n) { // there was no memory to note one
        return {};
    }
    cells.erase(cells.begin(), cells.end() - std::ptrdiff_t(n));
    return cells;
}

// llama_kv_cache::cpy_k and cpy_v: ggml_set_rows(cache, new rows, cells). With V transposed the indices are
// those of single values, so cells are taken where keys are stored; both go to the same ones.
bool cell_watcher::wants(const ggml_tensor * node) {
    if (node->op != GGML_OP_SET_ROWS || followed == NONE) {
        return false;
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
    return false;
}

} // namespace kvp
