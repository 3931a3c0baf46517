// bfloat16 in pairs, as far as the kernels need it.
#pragma once

#include "number.h"

struct __nv_bfloat162 {
  uint16_t x, y;
};
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {fastdiff::to_bf16(a), fastdiff::to_bf16(b)}; }
