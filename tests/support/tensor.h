// A tensor that owns its memory, on either device, with any strides. Tests make their inputs with
// it, hand `view()` to the operation and read `values()` back.
#pragma once

#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "core/tensor.h"

namespace mamba_native::test {

inline constexpr Device kCpu{DeviceType::cpu, 0};
inline constexpr Device kCuda{DeviceType::cuda, 0};

struct Shape {
  std::vector<std::int64_t> sizes;
  std::vector<std::int64_t> strides = {};  // in elements; empty: contiguous
  std::int64_t offset = 0;                 // elements before the first one
};

class Tensor {
 public:
  Tensor() = default;  // absent: view().present() is false

  // Every element, padding between strides included, is NaN (or -1 for integers), so that an output
  // that nobody wrote shows.
  Tensor(DType dtype, Device device, Shape shape);

  // Uniform in [low, high), rounded to dtype.
  static Tensor uniform(std::mt19937& random, DType dtype, Device device, Shape shape, double low,
                        double high);
  // In logical (row-major) order.
  static Tensor from_values(DType dtype, Device device, Shape shape,
                            const std::vector<double>& values);

  TensorView view() const;
  bool present() const { return storage_ != nullptr; }
  const Shape& shape() const { return shape_; }
  DType dtype() const { return dtype_; }
  Device device() const { return device_; }

  // Logical (row-major) order; waits for the device. Empty when absent.
  std::vector<double> values() const;
  // The whole storage as stored, padding included: to show that nothing changed.
  std::vector<unsigned char> bytes() const;

  // A copy with the same values and strides in another dtype or on another device. Absent stays
  // absent.
  Tensor to(DType dtype, Device device) const;

 private:
  std::int64_t storage_elements() const;
  std::int64_t offset_of(std::int64_t logical) const;
  std::int64_t numel() const;
  void upload(const std::vector<unsigned char>& host);

  DType dtype_ = DType::f32;
  Device device_;
  Shape shape_;
  std::shared_ptr<void> storage_;
};

}  // namespace mamba_native::test
