// A selective scan and its gradients on LibTorch's tensors. The README shows the part between the
// markers.
#include <cstdio>
#include <exception>
#include <map>
#include <string>
#include <vector>

// README begins
#include <ATen/ATen.h>
#include <ATen/DynamicLibrary.h>
#include <ATen/core/dispatch/Dispatcher.h>

// Calls an operation with arguments by name; those left out are their default, None or false.
std::vector<c10::IValue> call(const char* name, const std::map<std::string, c10::IValue>& given) {
  const auto operation = c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
  std::vector<c10::IValue> stack;
  for (const c10::Argument& argument : operation.schema().arguments()) {
    const bool flag = argument.type()->kind() == c10::TypeKind::BoolType;
    const c10::IValue none = flag ? c10::IValue(false) : c10::IValue();
    const auto found = given.find(argument.name());
    stack.push_back(found != given.end() ? found->second : argument.default_value().value_or(none));
  }
  operation.callBoxed(stack);  // c10::Error where an argument does not fit
  return stack;
}

void scan(const char* library, at::Device device) {
  at::DynamicLibrary(library, nullptr, /*leak_handle=*/true);  // mamba_native_cpu.so, _cu13.dll ...
  const at::Tensor u = at::ones({1, 4, 64}, device), A = at::full({4, 16}, -1.0, device);
  std::map<std::string, c10::IValue> inputs = {
      {"u", u}, {"delta", u * 0.5}, {"A", A}, {"B", -A}, {"C", -A}};
  const auto outputs = call("mamba_native::selective_scan_forward", inputs);
  const at::Tensor y = outputs[0].toTensor();

  inputs["dout"] = at::ones_like(y);
  inputs["checkpoints"] = outputs[2];
  const at::Tensor du = call("mamba_native::selective_scan_backward", inputs)[0].toTensor();
  for (const int t : {0, 63}) {
    std::printf("y[%d] = %.4f, du[%d] = %.4f\n", t, y[0][0][t].item<float>(), t,
                du[0][0][t].item<float>());
  }
}
// README ends

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s LIBRARY DEVICE\n", argv[0]);
    return 2;
  }
  try {
    scan(argv[1], at::Device(argv[2]));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
