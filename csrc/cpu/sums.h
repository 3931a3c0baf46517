// Two sums over many values at once, of a run or of each channel of rows: in float32 over short pieces and in float64
// over those, in an order that depends neither on the instruction set nor on the number of threads.
#pragma once

#include <algorithm>
#include <vector>

#include "tiles.h"
#include "vector.h"

namespace fastdiff {
namespace {

constexpr int64_t PIECE = 64;  // values of a lane that are summed in float32

struct Sums {
  double first = 0, second = 0;
};

// Two sums over a run of values; f(i, here, a, b) adds elements i, i + 1, ... to a and b, where `here` is at(F()).
// Several sums at once hide the latency of an addition.
template <typename P, typename G>
inline Sums sum_run(int64_t n, P at, G f) {
  constexpr int64_t LANES = 64, FOLDED = 16, WHOLE = 16 * PIECE, COUNT = LANES / WIDTH;
  const auto many = at(Floats{});
  const auto one = at(float{});
  double first[FOLDED] = {}, second[FOLDED] = {};
  for (int64_t begin = 0; begin < n; begin += WHOLE) {
    const int64_t end = std::min(begin + WHOLE, n), even = begin + (end - begin) / LANES * LANES;
    Floats sums[COUNT] = {}, others[COUNT] = {};
    for (int64_t i = begin; i < even; i += LANES)
      for (int64_t j = 0; j < COUNT; ++j) f(i + j * WIDTH, many, sums[j], others[j]);
    alignas(64) float a[LANES], b[LANES];
    memcpy(a, sums, sizeof a), memcpy(b, others, sizeof b);
    for (int64_t i = even; i < end; ++i) f(i, one, a[i - even], b[i - even]);
    const auto fold = [](const float* v, int64_t j) { return double((v[j] + v[j + 16]) + (v[j + 32] + v[j + 48])); };
    FOR(j, FOLDED) first[j] += fold(a, j), second[j] += fold(b, j);
  }
  Sums total;
  for (int64_t j = 0; j < FOLDED; ++j) total.first += first[j], total.second += second[j];
  return total;
}

// Two sums for each channel.
struct Columns {
  std::vector<double> first, second;

  Sums of(int64_t begin, int64_t end) const {
    Sums total;
    for (int64_t c = begin; c < end; ++c) total.first += first[size_t(c)], total.second += second[size_t(c)];
    return total;
  }
};

// Calls f(F(), Count<K>(), c) for channels c ... c + K count_of<F> - 1, a cache line or more at a time.
template <int K>
using Count = std::integral_constant<int, K>;
template <int COUNT, typename G>
inline void each_columns(int64_t channels, G f) {
  int64_t c = 0;
  for (; c + COUNT * WIDTH <= channels; c += COUNT * WIDTH) f(Floats{}, Count<COUNT>{}, c);
  for (; c + WIDTH <= channels; c += WIDTH) f(Floats{}, Count<1>{}, c);
  for (; c < channels; ++c) f(float{}, Count<1>{}, c);
}

// f(row, c, here, a, b) adds channels c, c + 1, ... of a row to a and b, where `here` is what at(F(), c) gives.
template <int COUNT, typename P, typename G>
inline Columns sum_columns(int64_t rows, int64_t channels, P at, G f) {
  std::vector<float> sums(static_cast<size_t>(2 * channels));
  Columns total{std::vector<double>(size_t(channels)), std::vector<double>(size_t(channels))};
  float *a = sums.data(), *b = a + channels;
  double *first = total.first.data(), *second = total.second.data();
  for (int64_t begin = 0; begin < rows; begin += PIECE) {
    const int64_t end = std::min(rows, begin + PIECE);
    each_columns<COUNT>(channels, [&](auto lane, auto count, int64_t c) {
      using F = decltype(lane);
      decltype(at(lane, c)) here[count()];
      F one[count()] = {}, other[count()] = {};
      for (int64_t k = 0; k < count(); ++k) here[k] = at(lane, c + k * count_of<F>);
      for (int64_t row = begin; row < end; ++row)
        for (int64_t k = 0; k < count(); ++k) f(row, c + k * count_of<F>, here[k], one[k], other[k]);
      for (int64_t k = 0; k < count(); ++k) {
        const int64_t to = c + k * count_of<F>;
        store(a, to, one[k]), store(b, to, other[k]);
      }
    });
    FOR(j, channels) first[j] += double(a[j]), second[j] += double(b[j]);
  }
  return total;
}

// Calls f(row, c, here) for channels c, c + 1, ... of each row, where `here` is what at(F(), c) gives.
template <int COUNT, typename P, typename G>
inline void each_of_rows(int64_t rows, int64_t channels, P at, G f) {
  for (int64_t begin = 0; begin < rows; begin += PIECE) {
    const int64_t end = std::min(rows, begin + PIECE);
    each_columns<COUNT>(channels, [&](auto lane, auto count, int64_t c) {
      using F = decltype(lane);
      decltype(at(lane, c)) here[count()];
      for (int64_t k = 0; k < count(); ++k) here[k] = at(lane, c + k * count_of<F>);
      for (int64_t row = begin; row < end; ++row)
        for (int64_t k = 0; k < count(); ++k) f(row, c + k * count_of<F>, here[k]);
    });
  }
}

}  // namespace
}  // namespace fastdiff
