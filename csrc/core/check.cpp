#include "core/check.h"

#include <cstdint>
#include <limits>

#include "core/error.h"

namespace mamba_native {

Shape::Shape(std::initializer_list<std::int64_t> sizes) {
  for (const std::int64_t extent : sizes) {
    size[dim++] = extent;
  }
}

void check_memory(const char* op, const char* argument, const TensorView& tensor, Device device) {
  check_device(op, argument, tensor, device);
  const std::int64_t limit = std::numeric_limits<std::int64_t>::max() / size_of(tensor.dtype);
  std::int64_t count = 1;
  std::int64_t last = 0;  // the farthest element's offset
  for (int i = 0; i < tensor.dim; ++i) {
    const std::int64_t size = tensor.size[i];
    const std::int64_t stride = tensor.stride[i];
    MAMBA_CHECK(size >= 0, op, ": ", argument, " has a negative size, got ", describe(tensor));
    MAMBA_CHECK(stride >= 0, op, ": ", argument, " has a negative stride, ", stride);
    if (size == 0) {
      return;
    }
    MAMBA_CHECK(count <= limit / size && (size == 1 || stride <= (limit - 1 - last) / (size - 1)),
                op, ": ", argument, " is larger than 64-bit offsets reach, got ", describe(tensor));
    count *= size;
    last += (size - 1) * stride;
  }
  MAMBA_CHECK(tensor.data != nullptr, op, ": ", argument, " has no memory, got ", describe(tensor));
}

void check_input(const char* op, const char* argument, const TensorView& tensor, Device device,
                 DType dtype, const Shape& shape) {
  MAMBA_CHECK(tensor.present(), op, ": ", argument, " is missing");
  check_shape(op, argument, tensor, shape.size, shape.dim);
  check_dtype(op, argument, tensor, dtype);
  check_memory(op, argument, tensor, device);
}

void check_optional_input(const char* op, const char* argument, const TensorView& tensor,
                          Device device, DType dtype, const Shape& shape) {
  if (tensor.present()) {
    check_input(op, argument, tensor, device, dtype, shape);
  }
}

void check_output(const char* op, const char* argument, const TensorView& tensor, Device device,
                  DType dtype, const Shape& shape) {
  check_input(op, argument, tensor, device, dtype, shape);
  const bool is_empty = tensor.numel() == 0;
  for (int i = 0; i < tensor.dim; ++i) {
    MAMBA_CHECK(is_empty || tensor.size[i] < 2 || tensor.stride[i] > 0, op, ": ", argument,
                " is written, so its elements may not share memory: stride 0 in dimension ", i);
  }
}

void check_optional_output(const char* op, const char* argument, const TensorView& tensor,
                           const char* owner, const TensorView& input, Device device, DType dtype,
                           const Shape& shape) {
  MAMBA_CHECK(tensor.present() == input.present(), op, ": ", argument,
              " must be given exactly when ", owner, " is");
  if (tensor.present()) {
    check_output(op, argument, tensor, device, dtype, shape);
  }
}

void check_contiguous(const char* op, const char* argument, const TensorView& tensor) {
  MAMBA_CHECK(tensor.is_contiguous(), op, ": ", argument, " must be contiguous");
}

}  // namespace mamba_native
