// Errors inside the library are C++ exceptions of this one type; guard() turns them into the values
// of the public header, so that nothing is thrown across it.
#pragma once

#include "kvp_edge.h"

#include <cstdarg>
#include <cstdio>
#include <exception>
#include <new>
#include <string>

namespace kvp {

struct error : std::exception {
    int32_t     code;
    std::string message;

    error(int32_t code, std::string message) : code(code), message(std::move(message)) {}
    const char * what() const noexcept override { return message.c_str(); }
};

// printf-style: fail(KVP_ERR_ARGUMENT, "position %d is ...", p)
[[noreturn]]
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
inline void fail(int32_t code, const char * format, ...) {
    char    text[sizeof(kvp_error::message)];
    va_list args;
    va_start(args, format);
    std::vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    throw error(code, text);
}

template <typename Body> int32_t guard(kvp_error * err, Body body) {
    int32_t     code = KVP_OK;
    std::string message;
    try {
        body();
    } catch (const error & e) {
        code    = e.code;
        message = e.message;
    } catch (const std::bad_alloc &) {
        code    = KVP_ERR_MEMORY;
        message = "out of memory";
    } catch (const std::exception & e) {
        code    = KVP_ERR_RUNTIME;
        message = e.what();
    }
    if (err) {
        err->code = code;
        std::snprintf(err->message, sizeof(err->message), "%s", message.c_str());
    }
    return code;
}

} // namespace kvp
