#include "binding.h"

#include "core/error.h"
#include "cuda_stream.h"

namespace mamba_native::binding {
namespace {

using torch::headeronly::DeviceType;

DType dtype_of(const char* op, const char* argument, Scalar scalar) {
  switch (scalar) {
    case Scalar::Float:
      return DType::f32;
    case Scalar::Half:
      return DType::f16;
    case Scalar::BFloat16:
      return DType::bf16;
    case Scalar::Double:
      return DType::f64;
    case Scalar::Int:
      return DType::i32;
    case Scalar::Long:
      return DType::i64;
    default:
      fail(op, ": ", argument, " has dtype ", torch::headeronly::toString(scalar),
           ", expected a floating dtype (float32, float16, bfloat16, float64) or int32/int64 for "
           "indices");
  }
}

Device device_of(const char* op, const char* argument, const Tensor& tensor) {
  if (tensor.is_cuda()) {
    return {mamba_native::DeviceType::cuda, static_cast<int>(tensor.get_device_index())};
  }
  MAMBA_CHECK(tensor.is_cpu(), op, ": ", argument,
              " is on a device that is neither the CPU nor CUDA");
  return {};
}

}  // namespace

TensorView view(const char* op, const char* argument, const Tensor& tensor) {
  MAMBA_CHECK(tensor.defined(), op, ": ", argument, " must be a tensor, got None");
  MAMBA_CHECK(tensor.dim() <= TensorView::kMaxDim, op, ": ", argument, " has ", tensor.dim(),
              " dimensions, at most ", TensorView::kMaxDim, " are possible");
  TensorView out;
  out.dtype = dtype_of(op, argument, tensor.scalar_type());
  out.device = device_of(op, argument, tensor);
  out.data = tensor.data_ptr();
  out.dim = static_cast<int>(tensor.dim());
  for (int i = 0; i < out.dim; ++i) {
    out.size[i] = tensor.size(i);
    out.stride[i] = tensor.stride(i);
  }
  return out;
}

TensorView view(const char* op, const char* argument, const Optional& tensor) {
  return tensor.has_value() ? view(op, argument, *tensor) : TensorView();
}

void check_dim(const char* op, const char* argument, const Tensor& tensor, std::int64_t dim) {
  MAMBA_CHECK(tensor.defined(), op, ": ", argument, " must be a tensor, got None");
  MAMBA_CHECK(tensor.dim() == dim, op, ": ", argument, " must have ", dim, " dimensions, got ",
              describe(view(op, argument, tensor)));
}

Tensor empty(const Tensor& like, const Sizes& sizes, Scalar dtype) {
  std::vector<int> order(sizes.size());
  for (std::size_t i = 0; i < order.size(); ++i) {
    order[i] = static_cast<int>(i);
  }
  return empty_ordered(like, sizes, order, dtype);
}

Tensor empty_ordered(const Tensor& like, const Sizes& sizes, const std::vector<int>& order,
                     Scalar dtype) {
  Sizes strides(sizes.size());
  std::int64_t step = 1;
  for (std::size_t i = order.size(); i-- > 0;) {
    const std::size_t dim = static_cast<std::size_t>(order[i]);
    strides[dim] = step;
    step *= sizes[dim] > 0 ? sizes[dim] : 1;
  }
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<std::int64_t>(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<std::int32_t>(torch::stable::detail::from(dtype)),
      like.is_cuda() ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu(),
      like.get_device_index(), &handle));
  return Tensor(handle);
}

Tensor nothing(const Tensor& like, Scalar dtype) { return empty(like, {0}, dtype); }

Sizes sizes_of(const Tensor& tensor) {
  Sizes sizes;
  for (std::int64_t i = 0; i < tensor.dim(); ++i) {
    sizes.push_back(tensor.size(i));
  }
  return sizes;
}

Scalar accumulator_of(const Tensor& tensor) {
  return tensor.scalar_type() == Scalar::Double ? Scalar::Double : Scalar::Float;
}

Tensor to_dtype(const Tensor& tensor, Scalar dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

DeviceScope::DeviceScope(const Tensor& tensor) {
  if (tensor.is_cuda()) {
    guard_.emplace(tensor.get_device_index());
    stream_ = current_cuda_stream(tensor.get_device_index());
  }
}

}  // namespace mamba_native::binding
