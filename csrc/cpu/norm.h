// Group norm with what surrounds it in a U-Net: a residual in front, AdaGN's scale and shift and SiLU behind, forward
// and backward, over samples that are channels-last or contiguous.
//
// The variance is shifted: an eighth of a group gives a first mean, from which the second pass takes its differences.
// Whatever the values, the rest of the cancellation is at most eightfold.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "sums.h"
#include "tiles.h"

namespace fastdiff {
namespace {

inline float number(const Operand& operand, int64_t at, float otherwise) {
  if (!operand.data) return otherwise;
  switch (operand.type) {
    case Type::f32: return load<Type::f32, float>(operand.data, at);
    case Type::bf16: return load<Type::bf16, float>(operand.data, at);
    case Type::f16: return load<Type::f16, float>(operand.data, at);
    default: return float(reinterpret_cast<const double*>(operand.data)[at]);
  }
}

// A NaN as `to_brain` wants it.
inline float plain(float value) { return value == value ? value : NAN; }

// Weight and bias, as float32.
struct Parameters {
  std::vector<float> weight, bias;

  explicit Parameters(const GroupNorm& op) : weight(size_t(op.channels)), bias(size_t(op.channels)) {
    for (int64_t c = 0; c < op.channels; ++c) {
      weight[size_t(c)] = plain(number(op.weight, c * op.weight.stride[0], 1.0f));
      bias[size_t(c)] = plain(number(op.bias, c * op.bias.stride[0], 0.0f));
    }
  }
};

// What some channels of a sample are multiplied by and what is added: w (1 + scale), b (1 + scale) + shift.
struct Affine {
  std::vector<float> made;
  const float *gain, *offset;

  Affine(const GroupNorm& op, const Parameters& all, int64_t sample, int64_t first, int64_t count)
      : gain(all.weight.data() + first), offset(all.bias.data() + first) {
    if (!op.scale.data && !op.shift.data) return;
    made.resize(size_t(2 * count));
    for (int64_t c = 0; c < count; ++c) {
      const int64_t at = first + c;
      const float scale = 1.0f + number(op.scale, sample * op.scale.sample + at * op.scale.stride[0], 0.0f);
      const float shift = number(op.shift, sample * op.shift.sample + at * op.shift.stride[0], 0.0f);
      made[size_t(c)] = plain(gain[c] * scale), made[size_t(count + c)] = plain(offset[c] * scale + shift);
    }
    gain = made.data(), offset = gain + count;
  }
};

template <Type TYPE>
constexpr int64_t SIZE = TYPE == Type::f32 ? 4 : 2;

template <Type TYPE>
inline char* at(const Operand& operand, int64_t element) {
  return operand.data ? operand.data + element * SIZE<TYPE> : nullptr;
}

// Asks for an element to be read or written in a while, which may lie behind the last. The rows of a few channels lie
// apart, where the processor does not see them coming.
constexpr int64_t AHEAD = 32;
template <Type TYPE, bool WRITE = false>
inline void expect(const char* from, int64_t element) {
  const uintptr_t address = uintptr_t(from) + uintptr_t(element * SIZE<TYPE>);
  __builtin_prefetch(reinterpret_cast<const void*>(address), WRITE, WRITE ? 3 : 2);
}

// Whole groups of a channels-last sample that are walked together: `count` channels from `first`.
struct Block {
  int64_t sample, group, groups, first, count;
};

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

// Writes the sum with the residual of n elements, rounded once.
template <Type TYPE>
inline void add(const char* x, const char* r, char* h, int64_t n) {
  each(n, [&](auto lane, int64_t i) {
    using F = decltype(lane);
    store<TYPE>(h, i, load<TYPE, F>(x, i) + load<TYPE, F>(r, i));
  });
}

// What is normalised: x, or its sum with the residual, which is made here; `rows` of them so long and so far apart.
template <Type TYPE>
inline const char* normalised(
    const GroupNorm& op, int64_t sample, int64_t element, int64_t rows, int64_t length, int64_t apart) {
  const char* x = at<TYPE>(op.x, sample * op.x.sample + element);
  if (!op.residual.data) return x;
  const char* r = at<TYPE>(op.residual, sample * op.residual.sample + element);
  const Operand& kept = op.sum.data ? op.sum : op.result;
  char* h = at<TYPE>(kept, sample * kept.sample + element);
  const int64_t bytes = apart * SIZE<TYPE>;
  for (int64_t row = 0; row < rows; ++row) add<TYPE>(x + row * bytes, r + row * bytes, h + row * bytes, length);
  return h;
}

// Adds x to a, or its distance from a first mean to a and its square to b.
template <typename F>
inline void add_distance(F x, F near, F& a, F& b) {
  const F d = x - near;
  a += d, b = fma(d, d, b);
}

// What normalises some channels.
template <typename F>
struct Forward {
  F near, gain, offset;
};

// SiLU in the precision of the type that it is written to.
template <Type TYPE, bool SILU, typename F>
inline F activation(F x, const Forward<F>& at) {
  const F z = fma(x - at.near, at.gain, at.offset);
  if constexpr (!SILU) return z;
  return z / one_plus_exponential<TYPE != Type::f32>(z);
}

template <Type TYPE, bool SILU>
void forward_last(const GroupNorm& op, const Parameters& all, const Block& block, float*) {
  const int64_t channels = op.channels, count = block.count, rows = op.positions, width = channels / op.groups;
  const char* h = normalised<TYPE>(op, block.sample, block.first, rows, count, channels);
  char* y = at<TYPE>(op.result, block.sample * op.result.sample + block.first);
  std::vector<float> near(static_cast<size_t>(count)), a(near.size()), b(near.size());
  const int64_t some = (rows + 7) / 8;
  Columns sums = sum_columns<4>(some, count, [](auto lane, int64_t) { return lane; },
    [=](int64_t row, int64_t c, auto nothing, auto& first, auto&) {
      first += load<TYPE, decltype(nothing)>(h, row * channels + c);
    });
  for (int64_t c = 0; c < count; c += width) {
    const float mean = plain(float(sums.of(c, c + width).first / double(some * width)));
    std::fill(near.begin() + c, near.begin() + c + width, mean);
  }
  const float* from = near.data();
  sums = sum_columns<4>(rows, count, [=](auto lane, int64_t c) { return load<decltype(lane)>(from, c); },
    [=](int64_t row, int64_t c, auto mean, auto& first, auto& second) {
      expect<TYPE>(h, (row + AHEAD) * channels + c);
      add_distance(load<TYPE, decltype(mean)>(h, row * channels + c), mean, first, second);
    });
  const Affine affine(op, all, block.sample, block.first, count);
  for (int64_t g = 0; g < block.groups; ++g) {
    const int64_t begin = g * width, end = begin + width;
    const Moments m = moments_of(op, from[begin], sums.of(begin, end));
    keep(op, block.sample, block.group + g, m);
    for (int64_t c = begin; c < end; ++c) {
      a[size_t(c)] = plain(m.inverse * affine.gain[c]);
      b[size_t(c)] = plain(affine.offset[c] - m.rest * a[size_t(c)]);
    }
  }
  const float *gain = a.data(), *offset = b.data();
  const auto normal_at = [=](auto lane, int64_t c) {
    using F = decltype(lane);
    return Forward<F>{load<F>(from, c), load<F>(gain, c), load<F>(offset, c)};
  };
  each_of_rows<4>(rows, count, normal_at, [=](int64_t row, int64_t c, const auto& here) {
    const int64_t i = row * channels + c;
    expect<TYPE, true>(y, i + AHEAD * channels);
    store<TYPE>(y, i, activation<TYPE, SILU>(load<TYPE, std::decay_t<decltype(here.near)>>(h, i), here));
  });
}

template <Type TYPE, bool SILU>
void forward_group(const GroupNorm& op, const Parameters& all, int64_t sample, int64_t group, float*) {
  const int64_t width = op.channels / op.groups, rows = op.positions, n = width * rows, element = group * n;
  const Affine affine(op, all, sample, group * width, width);
  const char* h = normalised<TYPE>(op, sample, element, 1, n, n);
  char* y = at<TYPE>(op.result, sample * op.result.sample + element);
  const int64_t some = (n + 7) / 8;
  const Sums first = sum_run(some, [](auto lane) { return lane; },
                             [=](int64_t i, auto nothing, auto& a, auto&) {
                               a += load<TYPE, decltype(nothing)>(h, i);
                             });
  const float near = plain(float(first.first / double(some)));
  const Sums sums = sum_run(n, [=](auto lane) { return spread<decltype(lane)>(near); },
                            [=](int64_t i, auto mean, auto& a, auto& b) {
                              add_distance(load<TYPE, decltype(mean)>(h, i), mean, a, b);
                            });
  const Moments m = moments_of(op, near, sums);
  keep(op, sample, group, m);
  for (int64_t c = 0; c < width; ++c) {
    const float gain = plain(m.inverse * affine.gain[c]);
    const float offset = plain(affine.offset[c] - m.rest * gain);
    each(rows, [=](auto lane, int64_t row) {
      using F = decltype(lane);
      const int64_t i = c * rows + row;
      const Forward<F> here{spread<F>(near), spread<F>(gain), spread<F>(offset)};
      store<TYPE>(y, i, activation<TYPE, SILU>(load<TYPE, F>(h, i), here));
    });
  }
}

// ---- backward ---------------------------------------------------------------------------------

// What the gradient of z = xhat gain + offset is computed from, for some channels.
template <typename F>
struct Channels {
  F mean, inverse, gain, offset;
};

// The gradient of z from that of its activation.
template <Type TYPE, bool SILU, typename F>
inline F slope(F grad, F z) {
  if constexpr (!SILU) return grad;
  const F s = spread<F>(1.0f) / one_plus_exponential<TYPE != Type::f32>(z);
  return grad * fma(s, fma(-z, s, z), s);
}

// The first pass: dz of elements i, ..., kept at k for the second, its sum and that of dz xhat.
template <Type TYPE, bool SILU, typename F>
inline void add_slope(
    const char* h, const char* dy, int64_t i, const Channels<F>& at, float* kept, int64_t k, F& a, F& b) {
  const F xhat = (load<TYPE, F>(h, i) - at.mean) * at.inverse;
  const F dz = slope<TYPE, SILU>(load<TYPE, F>(dy, i), fma(xhat, at.gain, at.offset));
  store(kept, k, dz);
  a += dz, b = fma(dz, xhat, b);
}

// What makes dx of dz and xhat: gain dz less the group's shares, by the inverse deviation.
template <typename F>
struct Backward {
  F mean, inverse, gain, all, along;
};

// The second.
template <Type TYPE, bool MORE, typename F>
inline void write_gradient(const char* h, F dz, const char* more, char* dx, int64_t i, const Backward<F>& at) {
  const F xhat = (load<TYPE, F>(h, i) - at.mean) * at.inverse;
  const F d = at.inverse * fma(-xhat, at.along, fma(at.gain, dz, -at.all));
  if constexpr (MORE) store<TYPE>(dx, i, d + load<TYPE, F>(more, i));
  if constexpr (!MORE) store<TYPE>(dx, i, d);
}

// A group's share of the gradient: the means of gain dz and of gain dz xhat, from the sums of its channels.
struct Shares {
  float all, along;
};

inline Shares shares_of(int64_t width, int64_t rows, const float* gain, const double* sums, const double* products) {
  const double count = double(width * rows);
  double all = 0, along = 0;
  for (int64_t c = 0; c < width; ++c) all += double(gain[c]) * sums[c], along += double(gain[c]) * products[c];
  return {plain(float(all / count)), plain(float(along / count))};
}

inline void keep(const GroupNorm& op, int64_t sample, int64_t first, const Columns& sums) {
  float* to = op.sums + 2 * (sample * op.channels + first);
  for (size_t c = 0; c < sums.first.size(); ++c) to[2 * c] = float(sums.first[c]), to[2 * c + 1] = float(sums.second[c]);
}

template <Type TYPE, bool SILU, bool MORE>
void backward_last(const GroupNorm& op, const Parameters& parameters, const Block& block, float* kept) {
  const int64_t channels = op.channels, count = block.count, rows = op.positions, width = channels / op.groups;
  const Affine affine(op, parameters, block.sample, block.first, count);
  const size_t size = size_t(count);
  std::vector<float> means(size), inverses(size), alls(size), alongs(size);
  for (int64_t c = 0; c < count; ++c) {
    const float* m = op.moments + 2 * (block.sample * op.groups + block.group + c / width);
    means[size_t(c)] = plain(m[0]), inverses[size_t(c)] = plain(m[1]);
  }
  const float *mean = means.data(), *inverse = inverses.data(), *gain = affine.gain, *offset = affine.offset;
  const auto channels_at = [=](auto lane, int64_t c) {
    using F = decltype(lane);
    return Channels<F>{load<F>(mean, c), load<F>(inverse, c), load<F>(gain, c), load<F>(offset, c)};
  };
  const char* h = at<TYPE>(op.x, block.sample * op.x.sample + block.first);
  const char* dy = at<TYPE>(op.grad, block.sample * op.grad.sample + block.first);
  const char* more = at<TYPE>(op.residual, block.sample * op.residual.sample + block.first);
  char* dx = at<TYPE>(op.result, block.sample * op.result.sample + block.first);
  const Columns sums = sum_columns<2>(rows, count, channels_at,
    [=](int64_t row, int64_t c, const auto& here, auto& a, auto& b) {
      expect<TYPE>(h, (row + AHEAD) * channels + c), expect<TYPE>(dy, (row + AHEAD) * channels + c);
      add_slope<TYPE, SILU>(h, dy, row * channels + c, here, kept, row * count + c, a, b);
    });
  keep(op, block.sample, block.first, sums);
  for (int64_t c = 0; c < count; c += width) {
    const Shares shares = shares_of(width, rows, gain + c, sums.first.data() + c, sums.second.data() + c);
    std::fill(alls.begin() + c, alls.begin() + c + width, shares.all);
    std::fill(alongs.begin() + c, alongs.begin() + c + width, shares.along);
  }
  const float *all = alls.data(), *along = alongs.data();
  const auto back_at = [=](auto lane, int64_t c) {
    using F = decltype(lane);
    return Backward<F>{load<F>(mean, c), load<F>(inverse, c), load<F>(gain, c), load<F>(all, c), load<F>(along, c)};
  };
  each_of_rows<4>(rows, count, back_at, [=](int64_t row, int64_t c, const auto& here) {
    expect<TYPE, true>(dx, (row + AHEAD) * channels + c);
    const auto dz = load<std::decay_t<decltype(here.mean)>>(kept, row * count + c);
    write_gradient<TYPE, MORE>(h, dz, more, dx, row * channels + c, here);
  });
}

template <Type TYPE, bool SILU, bool MORE>
void backward_group(const GroupNorm& op, const Parameters& parameters, int64_t sample, int64_t group, float* kept) {
  const int64_t width = op.channels / op.groups, rows = op.positions, element = group * width * rows;
  const Affine affine(op, parameters, sample, group * width, width);
  const float *m = op.moments + 2 * (sample * op.groups + group), mean = plain(m[0]), inverse = plain(m[1]);
  const char* h = at<TYPE>(op.x, sample * op.x.sample + element);
  const char* dy = at<TYPE>(op.grad, sample * op.grad.sample + element);
  const char* more = at<TYPE>(op.residual, sample * op.residual.sample + element);
  char* dx = at<TYPE>(op.result, sample * op.result.sample + element);
  Columns sums{std::vector<double>(size_t(width)), std::vector<double>(size_t(width))};
  for (int64_t c = 0; c < width; ++c) {
    const float gain = affine.gain[c], offset = affine.offset[c];
    const auto channel = [=](auto lane) {
      using F = decltype(lane);
      return Channels<F>{spread<F>(mean), spread<F>(inverse), spread<F>(gain), spread<F>(offset)};
    };
    const Sums total = sum_run(rows, channel, [=](int64_t row, const auto& here, auto& a, auto& b) {
      add_slope<TYPE, SILU>(h, dy, c * rows + row, here, kept, c * rows + row, a, b);
    });
    sums.first[size_t(c)] = total.first, sums.second[size_t(c)] = total.second;
  }
  keep(op, sample, group * width, sums);
  const Shares shares = shares_of(width, rows, affine.gain, sums.first.data(), sums.second.data());
  for (int64_t c = 0; c < width; ++c) {
    const float gain = affine.gain[c];
    each(rows, [=](auto lane, int64_t row) {
      using F = decltype(lane);
      const Backward<F> here{
          spread<F>(mean), spread<F>(inverse), spread<F>(gain), spread<F>(shares.all), spread<F>(shares.along)};
      write_gradient<TYPE, MORE>(h, load<F>(kept, c * rows + row), more, dx, c * rows + row, here);
    });
  }
}

// ---- blocks and groups over threads -------------------------------------------------------------

// How many groups of a channels-last sample are walked together: those of whole cache lines, and as many more as stay
// in a core's second-level cache, of which a value takes so many `bytes`, or all where none stay; but every thread
// gets a part, and the parts are as even as they can be.
inline int64_t groups_together(const GroupNorm& op, int64_t size, int64_t bytes, int team) {
  constexpr int64_t IN_CACHE = 1 << 20, LINE = 64;
  const int64_t width = op.channels / op.groups, group = width * op.positions * bytes;
  int64_t unit = 1;
  while (unit < op.groups && (unit * width * size) % LINE) ++unit;
  const int64_t units = (op.groups + unit - 1) / unit;
  const int64_t most = unit * group > IN_CACHE ? units : IN_CACHE / (unit * group);
  int64_t parts = (units + most - 1) / most;
  while (parts < units && op.samples * parts < team) ++parts;
  return (units + parts - 1) / parts * unit;
}

// Memory of a thread, kept for the next call while it is small: fresh pages cost more than what is done in them.
inline float* scratch_of(int64_t count, std::unique_ptr<float[]>& large) {
  constexpr int64_t SMALL = 256 << 10;
  if (count > SMALL) return (large.reset(new float[size_t(count)]), large.get());
  static thread_local std::vector<float> small;
  if (small.size() < size_t(count)) small.resize(size_t(count));
  return small.data();
}

// Calls f(unit, scratch) for each unit of work, by so many threads, each with a scratch of its own.
template <typename F>
void share(int64_t units, int team, int64_t scratch, F f) {
#pragma omp parallel num_threads(team) if (team > 1)
  {
    std::unique_ptr<float[]> large;
    float* const own = scratch_of(scratch, large);
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < units; ++unit) f(unit, own);
  }
}

template <Type TYPE, bool SILU>
void run_norm(const GroupNorm& op, int threads) {
  const Parameters parameters(op);
  const int64_t width = op.channels / op.groups, worth = op.samples * op.channels * op.positions / WORTH_A_THREAD;
  const int team = int(std::max<int64_t>(1, std::min<int64_t>(threads, worth)));
  const int64_t bytes = op.grad.data ? 3 * SIZE<TYPE> + 4 : 2 * SIZE<TYPE>;  // x, dy, dz, dx; x, y
  const int64_t together = op.channels_last ? groups_together(op, SIZE<TYPE>, bytes, team) : 1;
  const int64_t parts = (op.groups + together - 1) / together;
  const int64_t scratch = op.grad.data ? together * width * op.positions : 0;
  const bool more = op.residual.data;
  const auto last = !op.grad.data ? forward_last<TYPE, SILU>
                    : more        ? backward_last<TYPE, SILU, true>
                                  : backward_last<TYPE, SILU, false>;
  const auto first = !op.grad.data ? forward_group<TYPE, SILU>
                     : more        ? backward_group<TYPE, SILU, true>
                                   : backward_group<TYPE, SILU, false>;
  share(op.samples * parts, team, scratch, [&](int64_t unit, float* own) {
    const int64_t sample = unit / parts, group = unit % parts * together;
    if (!op.channels_last) return first(op, parameters, sample, group, own);
    const int64_t groups = std::min(together, op.groups - group);
    last(op, parameters, {sample, group, groups, group * width, groups * width}, own);
  });
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
