// The one exception of the library, and the check that throws it.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace mamba_native {

// Says what was wrong, what was expected and what to do. Becomes RuntimeError in Python.
class Error : public std::runtime_error {
 public:
  explicit Error(const std::string& message) : std::runtime_error(message) {}
};

// Joins the arguments' text.
template <class... Args>
std::string text(const Args&... args) {
  std::ostringstream stream;
  (stream << ... << args);
  return stream.str();
}

template <class... Args>
[[noreturn]] void fail(const Args&... args) {
  throw Error(text(args...));
}

}  // namespace mamba_native

// The message's arguments are evaluated only on failure.
#define MAMBA_CHECK(condition, ...)      \
  do {                                   \
    if (!(condition)) {                  \
      ::mamba_native::fail(__VA_ARGS__); \
    }                                    \
  } while (false)
