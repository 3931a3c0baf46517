// Some float32 side by side, as many as a register of the level holds, under the names that one has: a computation is
// written once, for `Floats` and for the `float` of what is left over, and gives the same bits at every level.
#pragma once

#include "../number.h"
#include "lanes.h"

namespace fastdiff {
namespace {

#if defined(__x86_64__) && LEVEL_LANES == 8
constexpr int64_t WIDTH = 16;
#elif defined(__x86_64__) && LEVEL_LANES == 4
constexpr int64_t WIDTH = 8;
#else
constexpr int64_t WIDTH = 4;
#endif
using Floats = float __attribute__((vector_size(4 * WIDTH)));
using Integers = uint32_t __attribute__((vector_size(4 * WIDTH)));
using Halves = uint16_t __attribute__((vector_size(2 * WIDTH)));

template <typename F>
constexpr int64_t count_of = sizeof(F) / sizeof(float);

// ---- float16 ----------------------------------------------------------------------------------

inline float from_half(uint16_t h) { return from_f16(h); }
inline uint16_t to_half(float v) { return to_f16(v); }

inline Floats from_half(Halves h) {
#if defined(__x86_64__) && LEVEL_LANES == 8
  return _mm512_cvtph_ps(reinterpret_cast<__m256i>(h));
#elif defined(__x86_64__) && LEVEL_LANES == 4
  return _mm256_cvtph_ps(reinterpret_cast<__m128i>(h));
#else
  Floats v;
  for (int j = 0; j < WIDTH; ++j) v[j] = from_f16(h[j]);
  return v;
#endif
}

inline Halves to_half(Floats v) {
#if defined(__x86_64__) && LEVEL_LANES == 8
  return reinterpret_cast<Halves>(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__x86_64__) && LEVEL_LANES == 4
  return reinterpret_cast<Halves>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  Halves h;
  for (int j = 0; j < WIDTH; ++j) h[j] = to_f16(v[j]);
  return h;
#endif
}

// ---- bfloat16, whose NaN have a lower half of zeros here --------------------------------------

inline float from_brain(uint16_t h) { return from_bf16(h); }

// In the upper half of each word.
template <typename W>
inline W rounded_brain(W bits) {
  return bits + 0x7FFFu + ((bits >> 16) & 1u);
}
inline uint16_t to_brain(float v) { return uint16_t(rounded_brain(bits_as<uint32_t>(v)) >> 16); }

#if defined(__x86_64__) && LEVEL_LANES == 8
// Half k to the upper half of word k.
inline Floats from_brain(Halves h) {
  const __m512i to = _mm512_set_epi64(0x000F000F000E000E, 0x000D000D000C000C, 0x000B000B000A000A, 0x0009000900080008,
                                      0x0007000700060006, 0x0005000500040004, 0x0003000300020002, 0x0001000100000000);
  const __m512i halves = _mm512_castsi256_si512(reinterpret_cast<__m256i>(h));
  return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, to, halves));
}

// One more is added where the half is odd, and the upper halves move together.
inline Halves to_brain(Floats v) {
  const __m512i bits = _mm512_castps_si512(v), one = _mm512_set1_epi32(1), most = _mm512_set1_epi32(0x7FFF);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(1 << 16));
  const __m512i down = _mm512_add_epi32(bits, most), rounded = _mm512_mask_add_epi32(down, odd, down, one);
  const __m512i to = _mm512_set_epi64(0, 0, 0, 0, 0x001F001D001B0019, 0x0017001500130011, 0x000F000D000B0009,
                                      0x0007000500030001);
  return reinterpret_cast<Halves>(_mm512_castsi512_si256(_mm512_permutexvar_epi16(to, rounded)));
}
#else
inline Floats from_brain(Halves h) { return bits_as<Floats>(__builtin_convertvector(h, Integers) << 16); }
inline Halves to_brain(Floats v) { return __builtin_convertvector(rounded_brain(bits_as<Integers>(v)) >> 16, Halves); }
#endif

// ---- memory -----------------------------------------------------------------------------------

template <typename F>
struct Half {
  using type = uint16_t;
};
template <>
struct Half<Floats> {
  using type = Halves;
};

template <typename T>
inline T fetch(const void* from) {
  T value;
  memcpy(&value, from, sizeof(T));
  return value;
}

// Elements i, i + 1, ... of an array of a type.
template <Type TYPE, typename F>
inline F load(const char* from, int64_t i) {
  if constexpr (TYPE == Type::f32) return fetch<F>(from + 4 * i);
  if constexpr (TYPE == Type::bf16) return from_brain(fetch<typename Half<F>::type>(from + 2 * i));
  if constexpr (TYPE == Type::f16) return from_half(fetch<typename Half<F>::type>(from + 2 * i));
}

template <typename F>
inline F load(const float* from, int64_t i) {
  return fetch<F>(from + i);
}

template <Type TYPE, typename F>
inline void store(char* to, int64_t i, F value) {
  if constexpr (TYPE == Type::f32) memcpy(to + 4 * i, &value, sizeof value);
  if constexpr (TYPE == Type::bf16) {
    const auto half = to_brain(value);
    memcpy(to + 2 * i, &half, sizeof half);
  }
  if constexpr (TYPE == Type::f16) {
    const auto half = to_half(value);
    memcpy(to + 2 * i, &half, sizeof half);
  }
}

template <typename F>
inline void store(float* to, int64_t i, F value) {
  memcpy(to + i, &value, sizeof value);
}

// Calls f(F(), i) for elements 0 ... n - 1, as many at a time as an F has.
template <typename G>
inline void each(int64_t n, G f) {
  int64_t i = 0;
  for (; i + WIDTH <= n; i += WIDTH) f(Floats{}, i);
  for (; i < n; ++i) f(float{}, i);
}

}  // namespace

template <>
struct WordsOf<Floats> {
  using type = Integers;
};

template <>
struct Fused<Floats> {
  static FD_MEMBER Floats of(Floats a, Floats b, Floats c) {
#if defined(__x86_64__) && LEVEL_LANES == 8
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__x86_64__) && LEVEL_LANES == 4
    return _mm256_fmadd_ps(a, b, c);
#else
    for (int j = 0; j < WIDTH; ++j) c[j] = __builtin_fmaf(a[j], b[j], c[j]);
    return c;
#endif
  }
};

template <>
struct Bounded<Floats> {
  static FD_MEMBER Floats of(Floats a, float most) {
#if defined(__x86_64__) && LEVEL_LANES == 8
    return _mm512_max_ps(_mm512_min_ps(a, spread<Floats>(most)), spread<Floats>(-most));
#elif defined(__x86_64__) && LEVEL_LANES == 4
    return _mm256_max_ps(_mm256_min_ps(a, spread<Floats>(most)), spread<Floats>(-most));
#else
    for (int j = 0; j < WIDTH; ++j) a[j] = Bounded<float>::of(a[j], most);
    return a;
#endif
  }
};

}  // namespace fastdiff
