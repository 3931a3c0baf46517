// What every kernel file needs: elements of any type, one at a time, and the device on which a call launches.
#pragma once

#include <cuda_runtime.h>

#include "../number.h"
#include "../operand.h"

namespace fastdiff::cuda {
namespace {

__device__ __forceinline__ float load_one(const Operand& operand, int64_t at) {
  switch (operand.type) {
    case Type::f32: return reinterpret_cast<const float*>(operand.data)[at];
    case Type::f64: return float(reinterpret_cast<const double*>(operand.data)[at]);
    case Type::bf16: return from_bf16(reinterpret_cast<const uint16_t*>(operand.data)[at]);
    default: return from_f16(reinterpret_cast<const uint16_t*>(operand.data)[at]);
  }
}

__device__ __forceinline__ void store_one(const Operand& operand, int64_t at, float value) {
  switch (operand.type) {
    case Type::f32: reinterpret_cast<float*>(operand.data)[at] = value; break;
    case Type::f64: reinterpret_cast<double*>(operand.data)[at] = value; break;
    case Type::bf16: reinterpret_cast<uint16_t*>(operand.data)[at] = to_bf16(value); break;
    default: reinterpret_cast<uint16_t*>(operand.data)[at] = to_f16(value);
  }
}

// Puts the device of the tensors in place of the current one for a launch.
class Guard {
 public:
  explicit Guard(int device) {
    cudaGetDevice(&before_);
    if (before_ != device) cudaSetDevice(device), changed_ = true;
  }
  ~Guard() {
    if (changed_) cudaSetDevice(before_);
  }

 private:
  int before_ = 0;
  bool changed_ = false;
};

}  // namespace
}  // namespace fastdiff::cuda
