#include "cuda_stream.h"

#include "core/error.h"

#if defined(_WIN32)
#include <windows.h>
#else
#include <dlfcn.h>
#endif

namespace mamba_native::binding {
namespace {

using CurrentStream = std::int32_t (*)(std::int32_t device_index, void** stream);

constexpr char kSymbol[] = "aoti_torch_get_current_cuda_stream";

#if defined(_WIN32)
CurrentStream find() {
  const HMODULE library = GetModuleHandleW(L"torch_cuda.dll");
  return library == nullptr ? nullptr
                            : reinterpret_cast<CurrentStream>(
                                  reinterpret_cast<void*>(GetProcAddress(library, kSymbol)));
}
#else
CurrentStream find() {
  void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  return library == nullptr ? nullptr : reinterpret_cast<CurrentStream>(dlsym(library, kSymbol));
}
#endif

}  // namespace

void* current_cuda_stream(std::int32_t device_index) {
  static const CurrentStream look_up = find();
  MAMBA_CHECK(look_up != nullptr, kSymbol,
              " is not in this process: the tensors are on CUDA, but torch_cuda is not loaded");
  void* stream = nullptr;
  MAMBA_CHECK(look_up(device_index, &stream) == 0, kSymbol, " failed for CUDA device ",
              device_index);
  return stream;
}

}  // namespace mamba_native::binding
