// Where a context's cache lies, and the cell that every new token goes to: seen at the nodes that store keys and
// values while llama.cpp computes.
#pragma once

#include "observe/observer.h"

#include "ggml.h"

#include <cstdint>
#include <map>
#include <vector>

namespace kvp {

// One layer's cache, and the cells that were written to since the watcher was told to follow them.
struct seen_cache {
    const ggml_tensor *  k = nullptr;
    const ggml_tensor *  v = nullptr;
    std::vector<int64_t> cells;
};

class cell_watcher : public subscriber {
public:
    explicit cell_watcher(std::shared_ptr<observer> on) : subscriber(std::move(on)) {}

    static constexpr int32_t NONE = -1, ALL = -2; // in place of a layer

    // Follows all layers from now on, with what was seen before forgotten.
    void follow_all();
    // What was seen, by layer number in the model. From now on only the cells of layer `il` are followed, or
    // of NONE.
    std::map<int32_t, seen_cache> follow(int32_t il);
    // The cells of the newest n tokens, or nothing if they were not all seen; forgets what came before.
    std::vector<int64_t> take(size_t n);

protected:
    // Never: what it looks at is known before a node is computed.
    bool wants(const ggml_tensor * node) override;
    void see(const ggml_tensor *) override {}

private:
    int32_t                       followed = NONE;
    std::map<int32_t, seen_cache> seen;
};

} // namespace kvp
