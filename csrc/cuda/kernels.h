// The entry points on a CUDA device: each launches on a stream and returns cudaError_t.
#pragma once

#include "../operand.h"

namespace fastdiff::cuda {

int normal(const Normal&, int device, void* stream);
int add_noise(const AddNoise&, int device, void* stream);
int guide(const Guide&, int device, void* stream);
int affine_step(const AffineStep&, int device, void* stream);
int diffusion_loss(const DiffusionLoss&, int device, void* stream);

// Or TOO_LARGE: a group has more channels than a multiprocessor has room for.
constexpr int TOO_LARGE = -1;
int group_norm(const GroupNorm&, int device, void* stream);

const char* message(int error);

}  // namespace fastdiff::cuda
