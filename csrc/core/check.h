// Checks of whole arguments: shape, dtype, device and memory at once. Each throws Error, naming the
// operation and the argument. `op` and `argument` are literals.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "core/tensor.h"

namespace mamba_native {

// The sizes that a tensor has to have.
struct Shape {
  std::int64_t size[TensorView::kMaxDim] = {};
  int dim = 0;

  Shape(std::initializer_list<std::int64_t> sizes);
};

// The tensor's device, that its sizes and byte offsets fit 64 bits, that no stride is negative and
// that it has memory.
void check_memory(const char* op, const char* argument, const TensorView& tensor, Device device);

void check_input(const char* op, const char* argument, const TensorView& tensor, Device device,
                 DType dtype, const Shape& shape);
// The same for one that may be absent.
void check_optional_input(const char* op, const char* argument, const TensorView& tensor,
                          Device device, DType dtype, const Shape& shape);

// As check_input, and that no two elements share an address through a stride of 0.
void check_output(const char* op, const char* argument, const TensorView& tensor, Device device,
                  DType dtype, const Shape& shape);
// An output that is there exactly when the input `owner` is.
void check_optional_output(const char* op, const char* argument, const TensorView& tensor,
                           const char* owner, const TensorView& input, Device device, DType dtype,
                           const Shape& shape);

void check_contiguous(const char* op, const char* argument, const TensorView& tensor);

}  // namespace mamba_native
