// float16 in pairs, as far as the kernels need it.
#pragma once

#include "number.h"

struct __half2 {
  uint16_t x, y;
};
inline __half2 __floats2half2_rn(float a, float b) { return {fastdiff::to_f16(a), fastdiff::to_f16(b)}; }
inline float2 __half22float2(__half2 h) { return {fastdiff::from_f16(h.x), fastdiff::from_f16(h.y)}; }
