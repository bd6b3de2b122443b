// kvp_observer: the one callback that llama.cpp gets.
#include "observe/observer.h"

#include <algorithm>
#include <utility>

namespace kvp {

subscriber::subscriber(std::shared_ptr<observer> on) : on(std::move(on)) { this->on->subscribers.push_back(this); }

subscriber::~subscriber() {
    auto & all = on->subscribers;
    all.erase(std::remove(all.begin(), all.end(), this), all.end());
}

std::optional<error> subscriber::take_failure() { return std::exchange(failed, std::nullopt); }

template <typename Look> void subscriber::guarded(Look look) noexcept {
    try {
        look();
    } catch (const error & e) {
        failed = e;
    } catch (const std::bad_alloc &) {
        failed.emplace(KVP_ERR_MEMORY, "out of memory");
    } catch (const std::exception & e) {
        failed.emplace(KVP_ERR_RUNTIME, e.what());
    }
}

bool subscriber::ask(const ggml_tensor * node) noexcept {
    waiting = false;
    if (!failed) {
        guarded([&] { waiting = wants(node); });
    }
    return waiting;
}

void subscriber::show(const ggml_tensor * node) noexcept {
    if (waiting) {
        guarded([&] { see(node); });
    }
}

bool observer::on_node(ggml_tensor * node, bool ask) {
    if (!ask) {
        for (subscriber * s : subscribers) {
            s->show(node);
        }
        return !next_waits || next(node, false, next_data); // it may stop the graph, as without us
    }
    next_waits  = next && next(node, true, next_data);
    bool wanted = next_waits;
    for (subscriber * s : subscribers) {
        wanted = s->ask(node) || wanted;
    }
    return wanted;
}

} // namespace kvp

using namespace kvp;

namespace {

bool on_node(ggml_tensor * node, bool ask, void * user_data) {
    return static_cast<kvp_observer *>(user_data)->shared->on_node(node, ask);
}

} // namespace

extern "C" {

int32_t kvp_observer_create(kvp_eval_callback next, void * next_data, kvp_observer ** result, kvp_error * err) {
    return guard(err, [&] {
        if (!result) {
            fail(KVP_ERR_ARGUMENT, "kvp_observer_create: observer must not be NULL");
        }
        *result = new kvp_observer{ std::make_shared<observer>(next, next_data) };
    });
}

void kvp_observer_free(kvp_observer * handle) { delete handle; }

kvp_eval_callback kvp_observer_callback(void) { return on_node; }

} // extern "C"
