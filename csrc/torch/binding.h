// From torch's stable tensors to TensorView and back. Every binding file includes this, and nothing
// outside this room sees torch.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <vector>

#include "core/tensor.h"

namespace mamba_native::binding {

using torch::stable::Tensor;
using Scalar = torch::headeronly::ScalarType;
using Optional = std::optional<Tensor>;
using Sizes = std::vector<std::int64_t>;

// Throws Error, naming the argument, for a dtype, device or rank that no operation takes.
TensorView view(const char* op, const char* argument, const Tensor& tensor);
TensorView view(const char* op, const char* argument, const Optional& tensor);

// Throws Error unless the tensor has `dim` dimensions: bindings index sizes before the room
// validates.
void check_dim(const char* op, const char* argument, const Tensor& tensor, std::int64_t dim);

// Uninitialised, on `like`'s device.
Tensor empty(const Tensor& like, const Sizes& sizes, Scalar dtype);
// The same with the dimensions' memory order given, slowest first: {0, 2, 1} is channel-last.
Tensor empty_ordered(const Tensor& like, const Sizes& sizes, const std::vector<int>& order,
                     Scalar dtype);
// What stands for an absent result.
Tensor nothing(const Tensor& like, Scalar dtype);

Sizes sizes_of(const Tensor& tensor);

// float64 for float64, float32 for the rest: the dtype of sums and states.
Scalar accumulator_of(const Tensor& tensor);

// The tensor itself when it already has the dtype.
Tensor to_dtype(const Tensor& tensor, Scalar dtype);

// Makes the tensor's device current while an operation runs, and knows torch's current stream
// there.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& tensor);
  void* stream() const { return stream_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  void* stream_ = nullptr;
};

}  // namespace mamba_native::binding
