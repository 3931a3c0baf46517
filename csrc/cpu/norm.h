// Group norm with what surrounds it in a U-Net: a residual in front, AdaGN's scale and shift and SiLU behind, forward
// and backward, over samples that are channels-last or contiguous.
//
// The variance is shifted: an eighth of a group gives a first mean, from which the second pass takes its differences.
// Whatever the values, the rest of the cancellation is at most eightfold. Sums run in float32 over short pieces and in
// float64 over those, in an order that does not depend on the number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "tiles.h"

namespace fastdiff {
namespace {

constexpr int64_t PIECE = 64;  // values of a lane that are summed in float32

template <Type TYPE>
inline float read(const char* from, int64_t i) {
  if constexpr (TYPE == Type::f32) return reinterpret_cast<const float*>(from)[i];
  const uint16_t bits = reinterpret_cast<const uint16_t*>(from)[i];
  return TYPE == Type::bf16 ? from_bf16(bits) : from_f16(bits);
}

template <Type TYPE>
inline void write(char* to, int64_t i, float value) {
  if constexpr (TYPE == Type::f32) {
    reinterpret_cast<float*>(to)[i] = value;
  } else {
    reinterpret_cast<uint16_t*>(to)[i] = TYPE == Type::bf16 ? to_bf16(value) : to_f16(value);
  }
}

inline float number(const Operand& operand, int64_t sample, int64_t channel, float otherwise) {
  if (!operand.data) return otherwise;
  const int64_t at = sample * operand.sample + channel * operand.stride[0];
  switch (operand.type) {
    case Type::f32: return read<Type::f32>(operand.data, at);
    case Type::bf16: return read<Type::bf16>(operand.data, at);
    case Type::f16: return read<Type::f16>(operand.data, at);
    default: return float(reinterpret_cast<const double*>(operand.data)[at]);
  }
}

template <bool SILU>
inline float activation(float z) {
  return SILU ? z / (1.0f + exponential_within(-z)) : z;
}

// What some channels of a sample are multiplied by and what is added: w (1 + scale), b (1 + scale) + shift.
struct Affine {
  std::vector<float> gain, offset;

  Affine(const GroupNorm& op, int64_t sample, int64_t first, int64_t count)
      : gain(static_cast<size_t>(count)), offset(static_cast<size_t>(count)) {
    for (int64_t c = 0; c < count; ++c) {
      const float scale = 1.0f + number(op.scale, sample, first + c, 0.0f);
      gain[size_t(c)] = number(op.weight, sample, first + c, 1.0f) * scale;
      offset[size_t(c)] = number(op.bias, sample, first + c, 0.0f) * scale + number(op.shift, sample, first + c, 0.0f);
    }
  }
};

template <Type TYPE>
inline char* at(const Operand& operand, int64_t element) {
  constexpr int64_t SIZE = TYPE == Type::f32 ? 4 : 2;
  return operand.data ? operand.data + element * SIZE : nullptr;
}

// ---- sums -------------------------------------------------------------------------------------

struct Sums {
  double first = 0, second = 0;
};

// Two sums over a run of values; f(i, a, b) adds to a and b. Several sums at once hide the latency of an addition.
template <typename F>
inline Sums sum_run(int64_t n, F f) {
  constexpr int64_t LANES = 64, WIDTH = 16, WHOLE = 16 * PIECE;
  alignas(64) double first[WIDTH] = {}, second[WIDTH] = {};
  for (int64_t begin = 0; begin < n; begin += WHOLE) {
    alignas(64) float a[LANES] = {}, b[LANES] = {};
    const int64_t end = std::min(begin + WHOLE, n), even = begin + (end - begin) / LANES * LANES;
    for (int64_t i = begin; i < even; i += LANES) FOR(j, LANES) f(i + j, a[j], b[j]);
    for (int64_t i = even; i < end; ++i) f(i, a[i - even], b[i - even]);
    for (int64_t k = 0; k < LANES; k += WIDTH) FOR(j, WIDTH) first[j] += double(a[k + j]), second[j] += double(b[k + j]);
  }
  Sums total;
  for (int64_t j = 0; j < WIDTH; ++j) total.first += first[j], total.second += second[j];
  return total;
}

// Two sums for each channel of channels-last rows, pieces of rows side by side on so many threads; f(i, c, a, b) adds
// element i of channel c to a and b, for STEP rows while they are in registers.
template <int STEP, typename F>
inline std::vector<Sums> sum_columns(int64_t rows, int64_t channels, int threads, F f) {
  const int64_t pieces = (rows + PIECE - 1) / PIECE;
  std::vector<float> made(static_cast<size_t>(2 * pieces * channels));
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t piece = 0; piece < pieces; ++piece) {
    float *a = made.data() + 2 * piece * channels, *b = a + channels;
    int64_t row = piece * PIECE;
    const int64_t end = std::min(rows, row + PIECE);
    for (; STEP > 1 && row + STEP <= end; row += STEP) {
      FOR(c, channels) {
        float first = a[c], second = b[c];
        for (int64_t k = 0; k < STEP; ++k) f((row + k) * channels + c, c, first, second);
        a[c] = first, b[c] = second;
      }
    }
    for (; row < end; ++row) FOR(c, channels) f(row * channels + c, c, a[c], b[c]);
  }
  std::vector<Sums> total(static_cast<size_t>(channels));
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const float *a = made.data() + 2 * piece * channels, *b = a + channels;
    for (int64_t c = 0; c < channels; ++c) total[size_t(c)].first += double(a[c]), total[size_t(c)].second += double(b[c]);
  }
  return total;
}

// ---- forward ----------------------------------------------------------------------------------

struct Moments {
  float near, rest, inverse;  // the mean is near + rest; 1 / sqrt(variance + eps)
};

inline Moments moments_of(const GroupNorm& op, float near, Sums sums) {
  const double count = double(op.channels / op.groups * op.positions), rest = sums.first / count;
  const double variance = sums.second / count - rest * rest;
  return {near, float(rest), float(1.0 / std::sqrt((variance < 0 ? 0 : variance) + double(op.eps)))};
}

inline void keep(const GroupNorm& op, int64_t sample, int64_t group, const Moments& m) {
  if (!op.moments) return;
  float* to = op.moments + 2 * (sample * op.groups + group);
  to[0] = m.near + m.rest, to[1] = m.inverse;
}

// The sum with the residual, where there is one, rounded once; what is normalised either way.
template <Type TYPE>
inline const char* add_residual(const GroupNorm& op, int64_t element, int64_t sample, int64_t n) {
  const char* x = at<TYPE>(op.x, sample * op.x.sample + element);
  if (!op.residual.data) return x;
  const char* r = at<TYPE>(op.residual, sample * op.residual.sample + element);
  const Operand& kept = op.sum.data ? op.sum : op.result;
  char* h = at<TYPE>(kept, sample * kept.sample + element);
  FOR(i, n) write<TYPE>(h, i, read<TYPE>(x, i) + read<TYPE>(r, i));
  return h;
}

template <Type TYPE, bool SILU>
void forward_last(const GroupNorm& op, int64_t sample, int threads) {
  const int64_t channels = op.channels, rows = op.positions, width = channels / op.groups;
  const char* h = add_residual<TYPE>(op, 0, sample, rows * channels);
  char* y = at<TYPE>(op.result, sample * op.result.sample);
  const int64_t some = (rows + 7) / 8;
  std::vector<Sums> sums =
      sum_columns<4>(some, channels, threads, [=](int64_t i, int64_t, float& a, float&) { a += read<TYPE>(h, i); });
  const size_t count = size_t(channels);
  std::vector<float> near(count), a(count), b(count);
  for (int64_t g = 0; g < op.groups; ++g) {
    double total = 0;
    for (int64_t c = g * width; c < (g + 1) * width; ++c) total += sums[size_t(c)].first;
    std::fill(near.begin() + g * width, near.begin() + (g + 1) * width, float(total / double(some * width)));
  }
  const float* from = near.data();
  sums = sum_columns<4>(rows, channels, threads, [=](int64_t i, int64_t c, float& first, float& second) {
    const float d = read<TYPE>(h, i) - from[c];
    first += d, second += d * d;
  });
  const Affine affine(op, sample, 0, channels);
  for (int64_t g = 0; g < op.groups; ++g) {
    Sums total;
    for (int64_t c = g * width; c < (g + 1) * width; ++c)
      total.first += sums[size_t(c)].first, total.second += sums[size_t(c)].second;
    const Moments m = moments_of(op, near[size_t(g * width)], total);
    keep(op, sample, g, m);
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      a[size_t(c)] = m.inverse * affine.gain[size_t(c)];
      b[size_t(c)] = affine.offset[size_t(c)] - m.rest * a[size_t(c)];
    }
  }
  const float *gain = a.data(), *offset = b.data();
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t begin = row * channels;
    FOR(c, channels) {
      const float z = (read<TYPE>(h, begin + c) - from[c]) * gain[c] + offset[c];
      write<TYPE>(y, begin + c, activation<SILU>(z));
    }
  }
}

template <Type TYPE, bool SILU>
void forward_group(const GroupNorm& op, int64_t sample, int64_t group) {
  const int64_t width = op.channels / op.groups, rows = op.positions, n = width * rows, element = group * n;
  const Affine affine(op, sample, group * width, width);
  const char* h = add_residual<TYPE>(op, element, sample, n);
  char* y = at<TYPE>(op.result, sample * op.result.sample + element);
  const int64_t some = (n + 7) / 8;
  const Sums first = sum_run(some, [=](int64_t i, float& a, float&) { a += read<TYPE>(h, i); });
  const float near = float(first.first / double(some));
  const Moments m = moments_of(op, near, sum_run(n, [=](int64_t i, float& a, float& b) {
    const float d = read<TYPE>(h, i) - near;
    a += d, b += d * d;
  }));
  keep(op, sample, group, m);
  for (int64_t c = 0; c < width; ++c) {
    const float gain = m.inverse * affine.gain[size_t(c)], offset = affine.offset[size_t(c)] - m.rest * gain;
    FOR(i, rows) {
      const float z = (read<TYPE>(h, c * rows + i) - near) * gain + offset;
      write<TYPE>(y, c * rows + i, activation<SILU>(z));
    }
  }
}

// ---- backward ---------------------------------------------------------------------------------

// The gradient of z = xhat gain + offset from that of its activation.
template <bool SILU>
inline float slope(float grad, float z) {
  if (!SILU) return grad;
  const float s = 1.0f / (1.0f + exponential_within(-z));
  return grad * (s * (1.0f + z * (1.0f - s)));
}

// A group's share of the gradient: the means of gain dz and of gain dz xhat, from the sums of its channels.
struct Shares {
  float plain, along;
};

inline Shares shares_of(const GroupNorm& op, const float* gain, const Sums* sums) {
  const int64_t width = op.channels / op.groups;
  const double count = double(width * op.positions);
  double plain = 0, along = 0;
  for (int64_t c = 0; c < width; ++c) {
    plain += double(gain[c]) * sums[c].first, along += double(gain[c]) * sums[c].second;
  }
  return {float(plain / count), float(along / count)};
}

inline void keep(const GroupNorm& op, int64_t sample, int64_t channel, const Sums& sums) {
  float* to = op.sums + 2 * (sample * op.channels + channel);
  to[0] = float(sums.first), to[1] = float(sums.second);
}

template <Type TYPE, bool SILU, bool MORE>
void backward_last(const GroupNorm& op, int64_t sample, int threads) {
  const int64_t channels = op.channels, rows = op.positions, width = channels / op.groups;
  const Affine affine(op, sample, 0, channels);
  const size_t count = size_t(channels);
  std::vector<float> means(count), inverses(count), plain(count), along(count);
  for (int64_t c = 0; c < channels; ++c) {
    const float* m = op.moments + 2 * (sample * op.groups + c / width);
    means[size_t(c)] = m[0], inverses[size_t(c)] = m[1];
  }
  const char *h = at<TYPE>(op.x, sample * op.x.sample), *dy = at<TYPE>(op.grad, sample * op.grad.sample);
  const char* more = at<TYPE>(op.residual, sample * op.residual.sample);
  char* dx = at<TYPE>(op.result, sample * op.result.sample);
  const float *mean = means.data(), *inverse = inverses.data(), *gain = affine.gain.data(), *offset = affine.offset.data();
  const std::vector<Sums> sums = sum_columns<1>(rows, channels, threads, [=](int64_t i, int64_t c, float& a, float& b) {
    const float xhat = (read<TYPE>(h, i) - mean[c]) * inverse[c];
    const float dz = slope<SILU>(read<TYPE>(dy, i), xhat * gain[c] + offset[c]);
    if (TYPE == Type::f32) write<TYPE>(dx, i, dz);  // kept until the second pass, where nothing is lost by it
    a += dz, b += dz * xhat;
  });
  for (int64_t g = 0; g < op.groups; ++g) {
    const Shares shares = shares_of(op, affine.gain.data() + g * width, sums.data() + g * width);
    std::fill(plain.begin() + g * width, plain.begin() + (g + 1) * width, shares.plain);
    std::fill(along.begin() + g * width, along.begin() + (g + 1) * width, shares.along);
  }
  for (int64_t c = 0; c < channels; ++c) keep(op, sample, c, sums[size_t(c)]);
  const float *p = plain.data(), *q = along.data();
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t begin = row * channels;
    FOR(c, channels) {
      const float xhat = (read<TYPE>(h, begin + c) - mean[c]) * inverse[c];
      const float dz = TYPE == Type::f32 ? read<TYPE>(dx, begin + c)
                                         : slope<SILU>(read<TYPE>(dy, begin + c), xhat * gain[c] + offset[c]);
      const float d = inverse[c] * (gain[c] * dz - p[c] - xhat * q[c]);
      write<TYPE>(dx, begin + c, MORE ? d + read<TYPE>(more, begin + c) : d);
    }
  }
}

template <Type TYPE, bool SILU, bool MORE>
void backward_group(const GroupNorm& op, int64_t sample, int64_t group) {
  const int64_t width = op.channels / op.groups, rows = op.positions, element = group * width * rows;
  const Affine affine(op, sample, group * width, width);
  const float *m = op.moments + 2 * (sample * op.groups + group), mean = m[0], inverse = m[1];
  const char *h = at<TYPE>(op.x, sample * op.x.sample + element), *dy = at<TYPE>(op.grad, sample * op.grad.sample + element);
  const char* more = at<TYPE>(op.residual, sample * op.residual.sample + element);
  char* dx = at<TYPE>(op.result, sample * op.result.sample + element);
  std::vector<Sums> sums(static_cast<size_t>(width));
  for (int64_t c = 0; c < width; ++c) {
    const float gain = affine.gain[size_t(c)], offset = affine.offset[size_t(c)];
    const int64_t begin = c * rows;
    sums[size_t(c)] = sum_run(rows, [=](int64_t i, float& a, float& b) {
      const float xhat = (read<TYPE>(h, begin + i) - mean) * inverse;
      const float dz = slope<SILU>(read<TYPE>(dy, begin + i), xhat * gain + offset);
      if (TYPE == Type::f32) write<TYPE>(dx, begin + i, dz);  // kept until the second pass, where nothing is lost by it
      a += dz, b += dz * xhat;
    });
    keep(op, sample, group * width + c, sums[size_t(c)]);
  }
  const Shares shares = shares_of(op, affine.gain.data(), sums.data());
  for (int64_t c = 0; c < width; ++c) {
    const float gain = affine.gain[size_t(c)], offset = affine.offset[size_t(c)];
    FOR(i, rows) {
      const int64_t k = c * rows + i;
      const float xhat = (read<TYPE>(h, k) - mean) * inverse;
      const float dz = TYPE == Type::f32 ? read<TYPE>(dx, k) : slope<SILU>(read<TYPE>(dy, k), xhat * gain + offset);
      const float d = inverse * (gain * dz - shares.plain - xhat * shares.along);
      write<TYPE>(dx, k, MORE ? d + read<TYPE>(more, k) : d);
    }
  }
}

// ---- samples and groups over threads ------------------------------------------------------------

template <Type TYPE, bool SILU>
void run_norm(const GroupNorm& op, int threads) {
  const int64_t worth = op.samples * op.channels * op.positions / WORTH_A_THREAD;
  const int team = int(std::max<int64_t>(1, std::min<int64_t>(threads, worth)));
  const bool more = op.residual.data, outer = op.samples >= team;  // a thread has whole samples, which stay in its cache
  const auto last = !op.grad.data ? forward_last<TYPE, SILU>
                    : more        ? backward_last<TYPE, SILU, true>
                                  : backward_last<TYPE, SILU, false>;
  const auto first = !op.grad.data ? forward_group<TYPE, SILU>
                     : more        ? backward_group<TYPE, SILU, true>
                                   : backward_group<TYPE, SILU, false>;
  if (op.channels_last) {
#pragma omp parallel for num_threads(team) if (outer && team > 1) schedule(static)
    for (int64_t n = 0; n < op.samples; ++n) last(op, n, outer ? 1 : team);
  } else {
#pragma omp parallel for num_threads(team) if (team > 1) schedule(static)
    for (int64_t unit = 0; unit < op.samples * op.groups; ++unit) first(op, unit / op.groups, unit % op.groups);
  }
}

void group_norm(const GroupNorm& op, int threads) {
  const auto run = [&](auto f32, auto bf16, auto f16) {
    (op.x.type == Type::f32 ? f32 : op.x.type == Type::bf16 ? bf16 : f16)(op, threads);
  };
  if (op.silu) {
    run(run_norm<Type::f32, true>, run_norm<Type::bf16, true>, run_norm<Type::f16, true>);
  } else {
    run(run_norm<Type::f32, false>, run_norm<Type::bf16, false>, run_norm<Type::f16, false>);
  }
}

}  // namespace
}  // namespace fastdiff
