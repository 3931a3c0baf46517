// Words: neighbouring elements that a thread loads, keeps in shared memory and stores at once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "device.h"

namespace fastdiff::cuda {
namespace {

template <int COUNT>
struct Values {
  float v[COUNT];
};

// Sixteen bytes. The arithmetic of 16-bit tensors has the hardware's exponential and reciprocal: two units in the last
// place of float32 are nothing to them.
template <Type TYPE>
struct Vector {
  static constexpr bool WIDE = TYPE == Type::f32;  // holds a float32 as it is
  static constexpr int COUNT = WIDE ? 4 : 8, SIZE = 16 / COUNT;
  using Word = uint4;

  static __device__ __forceinline__ Word load(const Operand& operand, int64_t at) {
    return *reinterpret_cast<const uint4*>(operand.data + at * SIZE);
  }

  static __device__ __forceinline__ void store(const Operand& operand, int64_t at, const Word& word) {
    *reinterpret_cast<uint4*>(operand.data + at * SIZE) = word;
  }

  static __device__ __forceinline__ Values<COUNT> unpack(const Word& word) {
    const uint32_t bits[4] = {word.x, word.y, word.z, word.w};
    Values<COUNT> x;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (WIDE) {
        x.v[i] = bits_as<float>(bits[i]);
      } else if constexpr (TYPE == Type::bf16) {
        x.v[2 * i] = bits_as<float>(bits[i] << 16), x.v[2 * i + 1] = bits_as<float>(bits[i] & 0xFFFF0000u);
      } else {
        const float2 two = __half22float2(bits_as<__half2>(bits[i]));
        x.v[2 * i] = two.x, x.v[2 * i + 1] = two.y;
      }
    }
    return x;
  }

  static __device__ __forceinline__ Word pack(const Values<COUNT>& x) {
    uint32_t bits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (WIDE) {
        bits[i] = bits_as<uint32_t>(x.v[i]);
      } else if constexpr (TYPE == Type::bf16) {
        bits[i] = bits_as<uint32_t>(__floats2bfloat162_rn(x.v[2 * i], x.v[2 * i + 1]));
      } else {
        bits[i] = bits_as<uint32_t>(__floats2half2_rn(x.v[2 * i], x.v[2 * i + 1]));
      }
    }
    return make_uint4(bits[0], bits[1], bits[2], bits[3]);
  }

  static __device__ __forceinline__ Word sum(const Word& a, const Word& b, Type) {
    Values<COUNT> x = unpack(a);
    const Values<COUNT> y = unpack(b);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) x.v[i] += y.v[i];
    return pack(x);
  }

  static __device__ __forceinline__ float sigmoid(float z) {
    if constexpr (WIDE) return 1.0f / one_plus_exponential<false>(z);
    return __fdividef(1.0f, 1.0f + __expf(-z));
  }
};

// One element of any type, where sixteen bytes do not fit; a float32 until it is stored.
struct Single {
  static constexpr bool WIDE = true;
  static constexpr int COUNT = 1;
  using Word = float;

  static __device__ __forceinline__ Word load(const Operand& operand, int64_t at) { return load_one(operand, at); }
  static __device__ __forceinline__ void store(const Operand& to, int64_t at, Word x) { store_one(to, at, x); }
  static __device__ __forceinline__ Values<1> unpack(Word word) { return {{word}}; }
  static __device__ __forceinline__ Word pack(const Values<1>& x) { return x.v[0]; }

  static __device__ __forceinline__ Word sum(Word a, Word b, Type type) {
    const float x = a + b;
    return type == Type::f32 ? x : type == Type::bf16 ? from_bf16(to_bf16(x)) : from_f16(to_f16(x));
  }

  static __device__ __forceinline__ float sigmoid(float z) { return 1.0f / one_plus_exponential<false>(z); }
};

}  // namespace
}  // namespace fastdiff::cuda
