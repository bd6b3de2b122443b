// One callback for all who look at a context's graphs while llama.cpp computes them.
#pragma once

#include "error.h"
#include "kvp_edge.h"

#include "ggml.h"

#include <memory>
#include <optional>
#include <vector>

namespace kvp {

class observer;

// Is shown the nodes of a context's graphs, from when it is made until it is gone. It may outlive the observer's
// handle, but is neither made nor destroyed while the context computes.
class subscriber {
public:
    virtual ~subscriber();
    subscriber(const subscriber &)             = delete;
    subscriber & operator=(const subscriber &) = delete;

protected:
    explicit subscriber(std::shared_ptr<observer> on);

    // Called with every node before it is computed: whether `see` is called with it afterwards. Asking for a node
    // makes llama.cpp compute up to it and wait.
    virtual bool wants(const ggml_tensor * node) = 0;
    virtual void see(const ggml_tensor * node)   = 0;

    // What wants() or see() threw, and forgets it. llama.cpp has no way to hear of an error inside its graph, and
    // stopping the graph would leave nonsense in the cache. So the graph runs on, this subscriber is shown no more
    // of it, and whoever uses the subscriber next is told.
    std::optional<error> take_failure();

private:
    friend class observer;

    bool ask(const ggml_tensor * node) noexcept;
    void show(const ggml_tensor * node) noexcept;
    template <typename Look> void guarded(Look look) noexcept;

    std::shared_ptr<observer> on;
    std::optional<error>      failed;
    bool                      waiting = false; // for the node that llama.cpp is about to compute
};

class observer {
public:
    // next: a foreign callback that sees the nodes, too; or nullptr.
    observer(kvp_eval_callback next, void * next_data) : next(next), next_data(next_data) {}

    // llama.cpp asks about one node after another until one is wanted, computes up to it, and shows that one.
    bool on_node(ggml_tensor * node, bool ask);

private:
    friend class subscriber;

    std::vector<subscriber *> subscribers;
    kvp_eval_callback         next;
    void *                    next_data;
    bool                      next_waits = false;
};

} // namespace kvp

struct kvp_observer {
    std::shared_ptr<kvp::observer> shared; // with those who subscribed
};
