#include "core/tensor.h"

#include <algorithm>

#include "core/error.h"

namespace mamba_native {

const char* name(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "float32";
    case DType::f16:
      return "float16";
    case DType::bf16:
      return "bfloat16";
    case DType::f64:
      return "float64";
    case DType::i32:
      return "int32";
    case DType::i64:
      return "int64";
  }
  fail("unknown dtype ", static_cast<int>(dtype));
}

std::int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::f32:
    case DType::i32:
      return 4;
    case DType::f16:
    case DType::bf16:
      return 2;
    case DType::f64:
    case DType::i64:
      return 8;
  }
  fail("unknown dtype ", static_cast<int>(dtype));
}

bool is_floating(DType dtype) { return dtype != DType::i32 && dtype != DType::i64; }

std::string name(Device device) {
  return device.is_cuda() ? text("cuda:", device.index) : std::string("cpu");
}

TensorView::TensorView(void* pointer, DType type, std::initializer_list<std::int64_t> sizes,
                       Device where)
    : data(pointer), dtype(type), device(where), dim(static_cast<int>(sizes.size())) {
  MAMBA_CHECK(sizes.size() <= static_cast<std::size_t>(kMaxDim), "a tensor has at most ", kMaxDim,
              " dimensions, got ", sizes.size());
  int i = 0;
  for (const std::int64_t extent : sizes) {
    size[i++] = extent;
  }
  std::int64_t step = 1;
  for (i = dim - 1; i >= 0; --i) {
    stride[i] = step;
    step *= size[i];
  }
}

std::int64_t TensorView::numel() const {
  std::int64_t count = 1;
  for (int i = 0; i < dim; ++i) {
    count *= size[i];
  }
  return count;
}

bool TensorView::is_contiguous() const {
  if (numel() == 0) {
    return true;
  }
  std::int64_t step = 1;
  for (int i = dim - 1; i >= 0; --i) {
    if (size[i] != 1 && stride[i] != step) {
      return false;
    }
    step *= size[i];
  }
  return true;
}

namespace {

template <class Sizes>
std::string join(const Sizes& sizes) {
  std::string out = "(";
  const char* separator = "";
  for (const std::int64_t extent : sizes) {
    out += separator + std::to_string(extent);
    separator = ", ";
  }
  return out + ")";
}

struct SizeRange {
  const std::int64_t* first;
  int count;
  const std::int64_t* begin() const { return first; }
  const std::int64_t* end() const { return first + count; }
};

}  // namespace

void TensorView::mirror(int dimension) {
  if (size[dimension] > 0) {
    data = static_cast<char*>(data) + (size[dimension] - 1) * stride[dimension] * size_of(dtype);
    stride[dimension] = -stride[dimension];
  }
}

std::string describe(const TensorView& tensor) {
  if (!tensor.present()) {
    return "nothing";
  }
  return text(join(SizeRange{tensor.size, tensor.dim}), " ", name(tensor.dtype), " on ",
              name(tensor.device));
}

void check_shape(const char* op, const char* argument, const TensorView& tensor,
                 std::initializer_list<std::int64_t> expected) {
  check_shape(op, argument, tensor, expected.begin(), static_cast<int>(expected.size()));
}

void check_shape(const char* op, const char* argument, const TensorView& tensor,
                 const std::int64_t* expected, int dim) {
  MAMBA_CHECK(tensor.dim == dim && std::equal(expected, expected + dim, tensor.size), op, ": ",
              argument, " must have shape ", join(SizeRange{expected, dim}), ", got ",
              describe(tensor));
}

void check_dtype(const char* op, const char* argument, const TensorView& tensor, DType expected) {
  MAMBA_CHECK(tensor.dtype == expected, op, ": ", argument, " must be ", name(expected), ", got ",
              describe(tensor));
}

void check_device(const char* op, const char* argument, const TensorView& tensor, Device expected) {
  MAMBA_CHECK(tensor.device == expected, op, ": ", argument, " must be on ", name(expected),
              " like the other arguments, got ", describe(tensor));
}

void check_float(const char* op, const char* argument, const TensorView& tensor) {
  MAMBA_CHECK(is_floating(tensor.dtype), op, ": ", argument,
              " must be float32, float16, bfloat16 or (on the CPU) float64, got ",
              describe(tensor));
  MAMBA_CHECK(!(tensor.device.is_cuda() && tensor.dtype == DType::f64), op, ": ", argument,
              " is float64, which only the CPU takes; convert it to float32, got ",
              describe(tensor));
#if !MAMBA_WITH_F16
  MAMBA_CHECK(tensor.dtype != DType::f16, op, ": ", argument,
              " is float16, which this build left out; build again without MM_DISABLE_HALF");
#endif
#if !MAMBA_WITH_BF16
  MAMBA_CHECK(tensor.dtype != DType::bf16, op, ": ", argument,
              " is bfloat16, which this build left out; build again without MM_DISABLE_BF16");
#endif
}

}  // namespace mamba_native
