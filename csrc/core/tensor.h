// A tensor that somebody else owns: pointer, type, sizes and strides. Every operation's parameters
// are made of these.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "core/dtype.h"

namespace mamba_native {

enum class DeviceType : std::int8_t { cpu, cuda };

struct Device {
  DeviceType type = DeviceType::cpu;
  int index = 0;  // CUDA ordinal; 0 on the CPU

  bool is_cuda() const { return type == DeviceType::cuda; }
  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
  bool operator!=(const Device& other) const { return !(*this == other); }
};

// "cpu", "cuda:0".
std::string name(Device device);

struct TensorView {
  static constexpr int kMaxDim = 6;

  void* data = nullptr;
  DType dtype = DType::f32;
  Device device;
  int dim = -1;  // negative: an absent optional argument
  std::int64_t size[kMaxDim] = {0, 0, 0, 0, 0, 0};
  std::int64_t stride[kMaxDim] = {0, 0, 0, 0, 0, 0};  // in elements

  TensorView() = default;

  // Contiguous, last dimension fastest.
  TensorView(void* pointer, DType type, std::initializer_list<std::int64_t> sizes,
             Device where = Device());

  bool present() const { return dim >= 0; }
  std::int64_t numel() const;
  bool is_contiguous() const;
  // Begins at the last index of a dimension and runs back, with a negative stride.
  void mirror(int dimension);

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// "(2, 16, 64) float32 on cpu": how messages describe a tensor.
std::string describe(const TensorView& tensor);

// Checks that throw Error, naming the operation and the argument. `op` and `argument` are literals.
void check_shape(const char* op, const char* argument, const TensorView& tensor,
                 std::initializer_list<std::int64_t> expected);
void check_shape(const char* op, const char* argument, const TensorView& tensor,
                 const std::int64_t* expected, int dim);
void check_dtype(const char* op, const char* argument, const TensorView& tensor, DType expected);
void check_device(const char* op, const char* argument, const TensorView& tensor, Device expected);
// One of f32, f16, bf16, and f64 on the CPU; refuses a dtype that this build left out, by the name
// of the option that left it out.
void check_float(const char* op, const char* argument, const TensorView& tensor);

// Calls body(T{}) with the type that holds `dtype`: float, Half, BFloat16, and double where the
// body takes it. `dtype` has passed check_float.
template <class Body>
void for_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32:
      body(float{});
      return;
#if MAMBA_WITH_F16
    case DType::f16:
      body(Half{});
      return;
#endif
#if MAMBA_WITH_BF16
    case DType::bf16:
      body(BFloat16{});
      return;
#endif
    default:
      return;
  }
}

// Reads one element of any floating dtype as float: for weights, whose dtype is known at run time
// only.
inline float load_float(const void* data, DType dtype, std::int64_t offset) {
  switch (dtype) {
    case DType::f32:
      return static_cast<const float*>(data)[offset];
    case DType::f16:
      return to_float(static_cast<const Half*>(data)[offset]);
    case DType::bf16:
      return to_float(static_cast<const BFloat16*>(data)[offset]);
    case DType::f64:
      return static_cast<float>(static_cast<const double*>(data)[offset]);
    default:
      return 0.0f;
  }
}

// The same in double, for the reference implementations.
inline double load_double(const void* data, DType dtype, std::int64_t offset) {
  return dtype == DType::f64 ? static_cast<const double*>(data)[offset]
                             : static_cast<double>(load_float(data, dtype, offset));
}

inline void store_float(void* data, DType dtype, std::int64_t offset, double value) {
  switch (dtype) {
    case DType::f32:
      static_cast<float*>(data)[offset] = static_cast<float>(value);
      return;
    case DType::f16:
      static_cast<Half*>(data)[offset] = round_to_f16(static_cast<float>(value));
      return;
    case DType::bf16:
      static_cast<BFloat16*>(data)[offset] = round_to_bf16(static_cast<float>(value));
      return;
    case DType::f64:
      static_cast<double*>(data)[offset] = value;
      return;
    default:
      return;
  }
}

// Reads one element of an index tensor, int32 or int64.
inline std::int64_t load_index(const void* data, DType dtype, std::int64_t offset) {
  return dtype == DType::i64
             ? static_cast<const std::int64_t*>(data)[offset]
             : static_cast<std::int64_t>(static_cast<const std::int32_t*>(data)[offset]);
}

}  // namespace mamba_native
