// What the host compiler and nvcc call differently, so that everything above is written once.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FD_MEMBER __host__ __device__ __forceinline__
#define FD_HD FD_MEMBER
#else
#define FD_MEMBER inline __attribute__((always_inline))
#define FD_HD static FD_MEMBER
#endif

namespace fastdiff {

// Multiplication and addition round separately unless `fma` says otherwise: the files are compiled with
// -ffp-contract=off and --fmad=false, so that every backend gives the same bits.

FD_HD float fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

FD_HD float root(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}

template <typename To, typename From>
FD_HD To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From), "bits_as keeps the size");
  To result;
  memcpy(&result, &value, sizeof(To));
  return result;
}

// 2^e, e in 0 ... 30: CPUs without shifts by lane make it of a number's exponent.
FD_HD int32_t power_of_two(int32_t e) {
#if defined(__CUDA_ARCH__)
  return 1 << e;
#else
  return int32_t(bits_as<float>((e + 127) << 23));
#endif
}

}  // namespace fastdiff
