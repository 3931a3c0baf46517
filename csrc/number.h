// Numbers as tensors keep them (float32, bfloat16, float16, float64) and the one function beside Box-Muller's.
#pragma once

#include "platform.h"

namespace fastdiff {

FD_HD float from_bf16(uint16_t value) { return bits_as<float>(uint32_t(value) << 16); }

FD_HD uint16_t to_bf16(float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return uint16_t(value == value ? rounded : ((bits >> 16) | 0x40u));
}

FD_HD float from_f16(uint16_t value) {
  const uint32_t magnitude = value & 0x7FFFu, sign = uint32_t(value & 0x8000u) << 16;
  // Normal and infinite: move the exponent. Subnormal: the integer times 2^-24.
  const uint32_t moved = (magnitude << 13) + (magnitude >= 0x7C00u ? 0x70000000u : 0x38000000u);
  const uint32_t small = bits_as<uint32_t>(float(int32_t(magnitude)) * 0x1p-24f);
  return bits_as<float>((magnitude < 0x400u ? small : moved) | sign);
}

FD_HD uint16_t to_f16(float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7FFFFFFFu, sign = (bits >> 16) & 0x8000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 1/2 makes the sum's last place 2^-24, which rounds a subnormal as it should be.
  const uint32_t small = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3F000000u;
  uint32_t result = magnitude < 0x38800000u ? small : normal;
  result = magnitude >= 0x47800000u ? 0x7C00u : result;
  result = magnitude > 0x7F800000u ? 0x7E00u : result;
  return uint16_t(result | sign);
}

// What follows is for F = float and, on a CPU, for several of them side by side.
template <typename F>
struct WordsOf {
  using type = uint32_t;
};

template <typename F>
struct Fused;  // of(a, b, c) is a b + c, rounded once

template <typename F>
FD_HD F fma(F a, F b, F c) {
  return Fused<F>::of(a, b, c);
}

template <typename F>
FD_HD F spread(float value) {
  return value - F{};  // F{} + value would change -0, and so be computed
}

template <typename F>
struct Bounded {  // of(a, most) is a within -most ... most; a number even for NaN
  static FD_MEMBER F of(F a, float most) {
    const F below = a < most ? a : most;
    return below > -most ? below : -most;
  }
};

// (exp(f) - 1 - f) / f^2 for |f| <= log(2) / 2.
template <typename F>
FD_HD F exponential_tail(F f) {
  F p = fma(spread<F>(0x1.6dbc68p-10f), f, spread<F>(0x1.124148p-7f));
  p = fma(p, f, spread<F>(0x1.555454p-5f));
  p = fma(p, f, spread<F>(0x1.555486p-3f));
  return fma(p, f, spread<F>(0.5f));
}

// The same to 2^-17 of exp(f): enough for what is rounded to 16 bits.
template <typename F>
FD_HD F short_exponential_tail(F f) {
  return fma(fma(spread<F>(0x1.5224eap-5f), f, spread<F>(0x1.571d1ep-3f)), f, spread<F>(0x1.0006b8p-1f));
}

// 1 + exp(-z), z held within -87 ... 87 where 2^k is one factor; a number for NaN too, which is for the caller to keep.
template <bool SHORT, typename F>
FD_HD F one_plus_exponential(F z) {
  using W = typename WordsOf<F>::type;
  const F bounded = Bounded<F>::of(z, 87.0f), one = spread<F>(1.0f);
  // Adding 1.5 * 2^23 + 127 rounds to a whole number k, and leaves the exponent of 2^k in the sum's last bits.
  const F whole = spread<F>(0x1.8p23f + 127.0f), sum = fma(bounded, spread<F>(-0x1.715476p+0f), whole);
  const F f = fma(sum - whole, spread<F>(-0x1.62e430p-1f), -bounded);
  const F e = fma(f, fma(f, SHORT ? short_exponential_tail(f) : exponential_tail(f), one), one);
  return fma(e, bits_as<F>(bits_as<W>(sum) << 23), one);
}

// exp(x) to about one unit in the last place, 0 and infinity beyond the range of float32; NaN stays.
FD_HD float exponential(float x) {
  float bounded = x < -104.0f ? -104.0f : x;
  bounded = bounded > 89.0f ? 89.0f : bounded;
  // Adding 1.5 * 2^23 rounds to a whole number, which the sum then holds in its last bits.
  const float sum = bounded * 0x1.715476p+0f + 0x1.8p23f, k = sum - 0x1.8p23f;
  const float f = fma(k, 0x1.05c610p-29f, fma(k, -0x1.62e430p-1f, bounded));
  const float e = 1.0f + fma(f * f, exponential_tail(f), f);
  // 2^k in two factors, each of them a normal number.
  const int32_t whole = int32_t(bits_as<uint32_t>(sum) - 0x4B400000u), half = whole >> 1;
  return e * bits_as<float>(uint32_t(half + 127) << 23) * bits_as<float>(uint32_t(whole - half + 127) << 23);
}

// exp(d) - 1, and exp(d) - 1 - d, without cancellation near 0.
struct Growth {
  float all, rest;
};

FD_HD Growth growth(float d) {
  float p = fma(0x1.a01a02p-13f, d, 0x1.6c16c2p-10f);
  p = fma(p, d, 0x1.111112p-7f);
  p = fma(p, d, 0x1.555556p-5f);
  p = fma(p, d, 0x1.555556p-3f);
  p = fma(p, d, 0.5f);
  const float rest = d * d * p, all = exponential(d) - 1.0f;
  const bool near = d > -0.25f && d < 0.25f;
  return {near ? d + rest : all, near ? rest : all - d};
}

// The divergence of a step whose variance is learned, and its slope in the fraction's channel v, where the log of
// the variance is lo + (hi - lo) (1 + v) / 2 and the estimate of x0 misses by `miss` (Nichol & Dhariwal 2021, eq. 15).
struct Divergence {
  float value, slope;
};

FD_HD Divergence divergence(float v, float lo, float hi, float b, float miss) {
  const float f = (1.0f + v) / 2.0f, log_variance = f * hi + (1.0f - f) * lo;
  const float d = lo - log_variance, mean = b * miss, excess = mean * mean * exponential(-log_variance);
  const Growth e = growth(d);
  return {(e.rest + excess) / 2.0f, (-e.all - excess) / 2.0f * ((hi - lo) / 2.0f)};
}

}  // namespace fastdiff
