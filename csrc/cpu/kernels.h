// The entry points of one instruction set; each level is the same source compiled for other instructions.
#pragma once

#include "../operand.h"

#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)
#define FASTDIFF_LEVELS  // this compiler and processor have more levels than the baseline
#endif

namespace fastdiff {

struct Kernels {
  const char* name;
  void (*normal)(const Normal&, int threads);
  void (*add_noise)(const AddNoise&, int threads);
  void (*guide)(const Guide&, int threads);
  void (*affine_step)(const AffineStep&, int threads);
  void (*diffusion_loss)(const DiffusionLoss&, int threads);
  void (*group_norm)(const GroupNorm&, int threads);
  void (*philox)(const uint32_t* counters, const uint32_t* keys, uint32_t* words, int64_t count);
};

extern const Kernels baseline, avx2, avx512;

}  // namespace fastdiff
