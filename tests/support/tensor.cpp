#include "support/tensor.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "core/error.h"
#include "support/device_memory.h"

namespace mamba_native::test {
namespace {

std::shared_ptr<void> allocate(Device device, std::size_t bytes) {
  if (device.is_cuda()) {
    return std::shared_ptr<void>(device_allocate(bytes), device_release);
  }
  return std::shared_ptr<void>(::operator new(bytes), [](void* p) { ::operator delete(p); });
}

double read(const void* data, DType dtype, std::int64_t offset) {
  return is_floating(dtype) ? load_double(data, dtype, offset)
                            : static_cast<double>(load_index(data, dtype, offset));
}

void write(void* data, DType dtype, std::int64_t offset, double value) {
  if (dtype == DType::i32) {
    static_cast<std::int32_t*>(data)[offset] = static_cast<std::int32_t>(value);
  } else if (dtype == DType::i64) {
    static_cast<std::int64_t*>(data)[offset] = static_cast<std::int64_t>(value);
  } else {
    store_float(data, dtype, offset, value);
  }
}

}  // namespace

Tensor::Tensor(DType dtype, Device device, Shape shape)
    : dtype_(dtype), device_(device), shape_(std::move(shape)) {
  MAMBA_CHECK(shape_.strides.empty() || shape_.strides.size() == shape_.sizes.size(),
              "one stride for every size");
  if (shape_.strides.empty()) {
    std::int64_t step = 1;
    shape_.strides.resize(shape_.sizes.size());
    for (std::size_t i = shape_.sizes.size(); i-- > 0;) {
      shape_.strides[i] = step;
      step *= shape_.sizes[i];
    }
  }
  const std::int64_t elements = storage_elements();
  std::vector<unsigned char> host(static_cast<std::size_t>(elements * size_of(dtype_)), 0xff);
  for (std::int64_t i = 0; i < elements; ++i) {
    write(host.data(), dtype_, i,
          is_floating(dtype_) ? std::numeric_limits<double>::quiet_NaN() : -1.0);
  }
  storage_ = allocate(device_, std::max<std::size_t>(host.size(), 16));
  upload(host);
}

Tensor Tensor::uniform(std::mt19937& random, DType dtype, Device device, Shape shape, double low,
                       double high) {
  Tensor tensor(dtype, kCpu, std::move(shape));
  std::uniform_real_distribution<double> distribution(low, high);
  for (std::int64_t i = 0; i < tensor.numel(); ++i) {
    write(tensor.storage_.get(), dtype, tensor.offset_of(i), distribution(random));
  }
  return tensor.to(dtype, device);
}

Tensor Tensor::from_values(DType dtype, Device device, Shape shape,
                           const std::vector<double>& values) {
  Tensor tensor(dtype, kCpu, std::move(shape));
  MAMBA_CHECK(static_cast<std::int64_t>(values.size()) == tensor.numel(), "expected ",
              tensor.numel(), " values, got ", values.size());
  for (std::int64_t i = 0; i < tensor.numel(); ++i) {
    write(tensor.storage_.get(), dtype, tensor.offset_of(i), values[static_cast<std::size_t>(i)]);
  }
  return tensor.to(dtype, device);
}

TensorView Tensor::view() const {
  TensorView view;
  if (!present()) {
    return view;
  }
  view.data = static_cast<char*>(storage_.get()) + shape_.offset * size_of(dtype_);
  view.dtype = dtype_;
  view.device = device_;
  view.dim = static_cast<int>(shape_.sizes.size());
  for (int i = 0; i < view.dim; ++i) {
    view.size[i] = shape_.sizes[static_cast<std::size_t>(i)];
    view.stride[i] = shape_.strides[static_cast<std::size_t>(i)];
  }
  return view;
}

std::vector<unsigned char> Tensor::bytes() const {
  std::vector<unsigned char> host(static_cast<std::size_t>(storage_elements() * size_of(dtype_)));
  if (device_.is_cuda()) {
    copy_from_device(host.data(), storage_.get(), host.size());
  } else if (!host.empty()) {
    std::memcpy(host.data(), storage_.get(), host.size());
  }
  return host;
}

std::vector<double> Tensor::values() const {
  std::vector<double> out;
  if (!present()) {
    return out;
  }
  const std::vector<unsigned char> host = bytes();
  out.resize(static_cast<std::size_t>(numel()));
  for (std::int64_t i = 0; i < numel(); ++i) {
    out[static_cast<std::size_t>(i)] = read(host.data(), dtype_, offset_of(i));
  }
  return out;
}

Tensor Tensor::to(DType dtype, Device device) const {
  if (!present()) {
    return Tensor();
  }
  Tensor copy(dtype, device, shape_);
  std::vector<unsigned char> host = copy.bytes();
  const std::vector<double> source = values();
  for (std::int64_t i = 0; i < numel(); ++i) {
    write(host.data(), dtype, offset_of(i), source[static_cast<std::size_t>(i)]);
  }
  copy.upload(host);
  return copy;
}

std::int64_t Tensor::numel() const {
  std::int64_t count = 1;
  for (const std::int64_t extent : shape_.sizes) {
    count *= extent;
  }
  return count;
}

std::int64_t Tensor::storage_elements() const {
  std::int64_t last = shape_.offset;
  for (std::size_t i = 0; i < shape_.sizes.size(); ++i) {
    if (shape_.sizes[i] == 0) {
      return shape_.offset;
    }
    last += (shape_.sizes[i] - 1) * shape_.strides[i];
  }
  return last + 1;
}

std::int64_t Tensor::offset_of(std::int64_t logical) const {
  std::int64_t offset = shape_.offset;
  for (std::size_t i = shape_.sizes.size(); i-- > 0;) {
    offset += logical % shape_.sizes[i] * shape_.strides[i];
    logical /= shape_.sizes[i];
  }
  return offset;
}

void Tensor::upload(const std::vector<unsigned char>& host) {
  if (device_.is_cuda()) {
    copy_to_device(storage_.get(), host.data(), host.size());
  } else if (!host.empty()) {
    std::memcpy(storage_.get(), host.data(), host.size());
  }
}

}  // namespace mamba_native::test
