// What a kernel is given: the space it walks over, its operands in that order, a row of coefficients, and where
// its noise comes from. Plain data, the same on host and device.
#pragma once

#include <cstdint>

#include "platform.h"

namespace fastdiff {

enum class Type : int32_t { f32, f64, bf16, f16 };

constexpr int MAX_DIMS = 6;

// Elements of one sample in the order they are walked: row-major, or channels last.
struct Space {
  int64_t samples = 0, elements = 0;
  int dims = 0;
  bool streamed = false;  // more than a cache holds: results go past it
  int64_t size[MAX_DIMS] = {};
};

// A tensor [samples, ...]; absent when data is null. Flat: one float32 after the other in the order of the walk.
struct Operand {
  char* data = nullptr;
  Type type = Type::f32;
  bool flat = false;
  int64_t sample = 0;
  int64_t stride[MAX_DIMS] = {};
};

// One number, or one per sample, float32 or (wide) float64.
struct Scalar {
  const void* each = nullptr;
  bool wide = false;
  int64_t stride = 0;
  float value = 0;
};

// One whole number, or one per sample.
struct Index {
  const int64_t* each = nullptr;
  int64_t stride = 0;
  int64_t value = 0;
};

// Address of the noise (seed, step, sample, stream), or the noise itself as an operand. `element` is the
// row-major index of an element, as an operand without data. Where samples of `together` elements each are walked as
// one, they have one seed and step.
struct Noise {
  bool drawn = false, numbered = false;  // numbered: sample n has id n unless `sample` says otherwise
  Index seed, step, sample;
  uint32_t stream = 0;
  int64_t together = 0;
  Operand given, element;
};

// The letters of fastdiff/ops/row.py, in its order.
struct Row {
  float c_in, w, p, q, clip, a, b, c[3], e, s, lo, hi, u, v, k, m, n;
};
constexpr int LETTERS = sizeof(Row) / sizeof(float);

struct AffineStep {
  Space space;
  const float* table;
  int64_t rows;
  Index row;
  Operand x, output, fraction, uncond, history[3], anchor;
  Noise noise;
  Operand next, x0, push, next_anchor, input;
};

struct AddNoise {
  Space space;
  Operand x0;
  Scalar alpha, sigma;
  Noise noise;
  Operand result;
};

struct Guide {
  Space space;
  Operand cond, uncond;
  Scalar scale;
  Operand result;
};

// What the bound of a learned variance needs of a sample's timestep: the letters of fastdiff/ops/forward.py.
struct Bound {
  float alpha, sigma, p, q, b, lo, hi, weight;
};
constexpr int BOUND_LETTERS = sizeof(Bound) / sizeof(float);

// The loss [N], and what its gradient is made of: the differences from the target, and the slopes of the divergences.
// `bound` (N of them, or null) adds the bound of the variance that `fraction` stands for. `sums` is for the chunks of
// each sample, on a CUDA device.
struct DiffusionLoss {
  Space space;
  Operand output, fraction, x0;
  Scalar f, g, weight;
  const Bound* bound = nullptr;
  Noise noise;
  float *loss = nullptr, *sums = nullptr;
  Operand residual, slope;
};

// How many chunks of a sample's loss are summed apart on a CUDA device.
constexpr int64_t CHUNK = 16384;
inline int64_t chunks(int64_t elements) { return elements > CHUNK ? (elements + CHUNK - 1) / CHUNK : 1; }

// act(group norm(x + residual) (1 + scale) + shift). Forward: result, and where they are wanted the sum with the residual
// and the moments [N, groups, 2] (mean, 1 / standard deviation). Backward, where there is a `grad`: x is that sum, the
// residual what is added to its gradient, result the gradient, and sums [N, C, 2] are those of dz and of dz xhat.
struct GroupNorm {
  int64_t samples = 0, channels = 0, positions = 0, groups = 0;
  bool channels_last = false, silu = false;
  float eps = 0;
  Operand x, residual, weight, bias, scale, shift, grad, result, sum;
  float *moments = nullptr, *sums = nullptr;
};

struct Normal {
  Space space;
  Noise noise;
  Operand result;
};

FD_HD float of_sample(const Scalar& scalar, int64_t sample) {
  if (!scalar.each) return scalar.value;
  const int64_t at = sample * scalar.stride;
  return scalar.wide ? float(static_cast<const double*>(scalar.each)[at]) : static_cast<const float*>(scalar.each)[at];
}

FD_HD int64_t of_sample(const Index& index, int64_t sample) {
  return index.each ? index.each[sample * index.stride] : index.value;
}

// The part of a Philox counter and the key that a sample's noise shares.
struct Counter {
  uint32_t step, sample, stream, key0, key1;
};

FD_HD uint32_t id_of_sample(const Noise& noise, int64_t sample) {
  return uint32_t(noise.numbered ? sample : of_sample(noise.sample, sample));
}

FD_HD Counter counter(const Noise& noise, int64_t sample) {
  const uint64_t seed = uint64_t(of_sample(noise.seed, sample));
  const uint32_t step = uint32_t(of_sample(noise.step, sample));
  return {step, id_of_sample(noise, sample), noise.stream, uint32_t(seed), uint32_t(seed >> 32)};
}

}  // namespace fastdiff
