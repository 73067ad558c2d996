// MAMBA_BOX(f): the boxed form of an operation, as TORCH_BOX makes it, for every compiler.
#pragma once

#include <torch/csrc/stable/library.h>

#include "core/compiler.h"

#if !MAMBA_FOREIGN_EXCEPTIONS
#define MAMBA_BOX(function) TORCH_BOX(function)
#else

#include <windows.h>

#include <cstdio>
#include <cstdlib>
#include <exception>

// libtorch could not catch our exceptions: they would end the process. So they are caught here, by
// our own compiler's code, and msvcp140.dll throws a std::runtime_error with the same text.
namespace mamba_native::binding {

[[noreturn]] inline void throw_as_visual_cpp(const char* what) {
  using Throw = void (*)(const char*);
  const HMODULE runtime = GetModuleHandleW(L"msvcp140.dll");
  if (runtime != nullptr) {
    // std::_Xruntime_error(char const*)
    const FARPROC found = GetProcAddress(runtime, "?_Xruntime_error@std@@YAXPEBD@Z");
    if (found != nullptr) {
      reinterpret_cast<Throw>(reinterpret_cast<void*>(found))(what);
    }
  }
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

template <void (*function)(StableIValue*, std::uint64_t, std::uint64_t)>
void guarded(StableIValue* stack, std::uint64_t arguments, std::uint64_t results) {
  char what[4096];  // no destructor: the foreign exception passes over this frame
  try {
    function(stack, arguments, results);
    return;
  } catch (const std::exception& error) {
    std::snprintf(what, sizeof what, "%s", error.what());
  } catch (...) {
    std::snprintf(what, sizeof what, "an exception that is no std::exception");
  }
  throw_as_visual_cpp(what);  // outside of every handler: no exception of ours is in flight
}

}  // namespace mamba_native::binding

#define MAMBA_BOX(function) (&::mamba_native::binding::guarded<&TORCH_BOX(function)>)
#endif
