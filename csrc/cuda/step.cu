// The ops on a CUDA device. A thread takes four consecutive elements of a sample, which is one quad of noise; flat
// tensors are read and written sixteen bytes at a time. Row-major elements, unless nothing is drawn and the tensors
// are channels-last: then the order of their memory.
#include "../noise.h"
#include "device.h"
#include "kernels.h"

namespace fastdiff::cuda {
namespace {

constexpr int THREADS = 256;

struct Four {
  float v[4];
};

// Where a thread works: elements first ... first + count - 1 of a sample, count at most four.
struct Place {
  int64_t sample, first;
  int count;
};

__device__ __forceinline__ bool locate(const Space& space, Place& place) {
  const int64_t quads = (space.elements + 3) / 4, total = quads * space.samples;
  const int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= total) return false;
  if (total <= UINT32_MAX) {
    place.sample = uint32_t(i) / uint32_t(quads);
  } else {
    place.sample = i / quads;
  }
  place.first = (i - place.sample * quads) * 4;
  const int64_t rest = space.elements - place.first;
  place.count = rest < 4 ? int(rest) : 4;
  return true;
}

// FLAT: every operand is flat and aligned, so that four elements are one access.
template <bool FLAT>
struct Access;

template <>
struct Access<true> {
  const Space& space;
  const Place& place;

  __device__ __forceinline__ Access(const Space& space_, const Place& place_) : space(space_), place(place_) {}

  __device__ __forceinline__ int64_t at(const Operand& operand) const {
    return place.sample * operand.sample + place.first;
  }

  __device__ __forceinline__ Four load(const Operand& operand) const {
    if (operand.type == Type::f32) {
      const float4 x = *reinterpret_cast<const float4*>(reinterpret_cast<const float*>(operand.data) + at(operand));
      return {{x.x, x.y, x.z, x.w}};
    }
    const ushort4 x = *reinterpret_cast<const ushort4*>(reinterpret_cast<const uint16_t*>(operand.data) + at(operand));
    if (operand.type == Type::bf16) return {{from_bf16(x.x), from_bf16(x.y), from_bf16(x.z), from_bf16(x.w)}};
    return {{from_f16(x.x), from_f16(x.y), from_f16(x.z), from_f16(x.w)}};
  }

  __device__ __forceinline__ void store(const Operand& operand, const Four& x) const {
    if (operand.type == Type::f32) {
      __stcs(reinterpret_cast<float4*>(reinterpret_cast<float*>(operand.data) + at(operand)),
             make_float4(x.v[0], x.v[1], x.v[2], x.v[3]));
      return;
    }
    ushort4* to = reinterpret_cast<ushort4*>(reinterpret_cast<uint16_t*>(operand.data) + at(operand));
    if (operand.type == Type::bf16) {
      __stcs(to, make_ushort4(to_bf16(x.v[0]), to_bf16(x.v[1]), to_bf16(x.v[2]), to_bf16(x.v[3])));
    } else {
      __stcs(to, make_ushort4(to_f16(x.v[0]), to_f16(x.v[1]), to_f16(x.v[2]), to_f16(x.v[3])));
    }
  }
};

// Otherwise two dimensions with any strides, an element at a time.
template <>
struct Access<false> {
  const Space& space;
  const Place& place;
  int64_t outer[4];
  uint32_t inner[4];

  __device__ __forceinline__ Access(const Space& space_, const Place& place_) : space(space_), place(place_) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      outer[i] = place.first + i, inner[i] = 0;
      if (space.dims < 2) continue;
      const uint32_t element = uint32_t(outer[i]), size = uint32_t(space.size[1]);
      outer[i] = element / size, inner[i] = element % size;
    }
  }

  __device__ __forceinline__ int64_t at(const Operand& operand, int i) const {
    return place.sample * operand.sample + outer[i] * operand.stride[0] + inner[i] * operand.stride[1];
  }

  __device__ __forceinline__ Four load(const Operand& operand) const {
    Four x = {};
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < place.count) x.v[i] = load_one(operand, at(operand, i));
    return x;
  }

  __device__ __forceinline__ void store(const Operand& operand, const Four& x) const {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < place.count) store_one(operand, at(operand, i), x.v[i]);
  }
};

template <typename F>
__device__ __forceinline__ Four each(F f) {
  Four y;
#pragma unroll
  for (int i = 0; i < 4; ++i) y.v[i] = f(i);
  return y;
}

// DRAWN: the noise is made here. Its quad is the thread's, for the walk is row-major then.
template <bool DRAWN, bool FLAT>
__device__ __forceinline__ Four noise_at(const Noise& noise, const Access<FLAT>& access) {
  if constexpr (DRAWN) {
    const Counter at = counter(noise, access.place.sample);
    const Words words = philox(uint32_t(access.place.first / 4), at.step, at.sample, at.stream, at.key0, at.key1);
    const Normals z = normals(words);
    return {{z.z[0], z.z[1], z.z[2], z.z[3]}};
  } else {
    return access.load(noise.given);
  }
}

template <bool FLAT>
__global__ void __launch_bounds__(THREADS) normal_kernel(const __grid_constant__ Normal op) {
  Place place;
  if (!locate(op.space, place)) return;
  const Access<FLAT> access(op.space, place);
  access.store(op.result, noise_at<true>(op.noise, access));
}

template <bool DRAWN, bool FLAT>
__global__ void __launch_bounds__(THREADS) add_noise_kernel(const __grid_constant__ AddNoise op) {
  Place place;
  if (!locate(op.space, place)) return;
  const Access<FLAT> access(op.space, place);
  const Four x0 = access.load(op.x0);
  const float alpha = of_sample(op.alpha, place.sample), sigma = of_sample(op.sigma, place.sample);
  const Four z = noise_at<DRAWN>(op.noise, access);
  access.store(op.result, each([&](int i) { return alpha * x0.v[i] + sigma * z.v[i]; }));
}

template <bool FLAT>
__global__ void __launch_bounds__(THREADS) guide_kernel(const __grid_constant__ Guide op) {
  Place place;
  if (!locate(op.space, place)) return;
  const Access<FLAT> access(op.space, place);
  const Four cond = access.load(op.cond), uncond = access.load(op.uncond);
  const float scale = of_sample(op.scale, place.sample);
  access.store(op.result, each([&](int i) { return uncond.v[i] + scale * (cond.v[i] - uncond.v[i]); }));
}

__device__ __forceinline__ float clamp(float x, float bound) { return x < -bound ? -bound : x > bound ? bound : x; }

template <bool DRAWN, bool FLAT>
__global__ void __launch_bounds__(THREADS, DRAWN && FLAT ? 6 : 4) affine_step_kernel(
    const __grid_constant__ AffineStep op) {
  Place place;
  if (!locate(op.space, place)) return;
  const Access<FLAT> access(op.space, place);
  const int64_t row = of_sample(op.row, place.sample);
  if (row < 0 || row >= op.rows) return;
  const float* table = op.table + row * LETTERS;
  const Row& r = *reinterpret_cast<const Row*>(table);
  const Four x = access.load(op.x);
  Four out = access.load(op.output), uncond = {}, z = {};
  if (op.uncond.data) uncond = access.load(op.uncond);
  // While the loads are on their way.
  if (DRAWN || op.noise.given.data) z = noise_at<DRAWN>(op.noise, access);
  if (op.uncond.data) {
    out = each([&](int i) { return uncond.v[i] + r.w * (out.v[i] - uncond.v[i]); });
  }
  const Four x0 = each([&](int i) { return clamp(r.p * x.v[i] + r.q * out.v[i], r.clip); });
  Four next = each([&](int i) { return r.a * x.v[i] + r.b * x0.v[i]; });
#pragma unroll
  for (int j = 0; j < 3; ++j) {
    if (!op.history[j].data) break;
    const Four h = access.load(op.history[j]);
    next = each([&](int i) { return next.v[i] + r.c[j] * h.v[i]; });
  }
  Four anchor = {};
  if (op.anchor.data) {
    anchor = access.load(op.anchor);
    next = each([&](int i) { return next.v[i] + r.e * anchor.v[i]; });
    anchor = each([&](int i) { return r.k * anchor.v[i] + r.m * x.v[i] + r.n * x0.v[i]; });
  }
  if (DRAWN || op.noise.given.data) {
    Four std = each([&](int) { return r.s; });
    if (op.fraction.data) {
      const Four v = access.load(op.fraction);
      std = each([&](int i) {
        const float f = (1.0f + v.v[i]) / 2.0f;
        return r.s * exponential((f * r.hi + (1.0f - f) * r.lo) / 2.0f);
      });
    }
    next = each([&](int i) { return next.v[i] + std.v[i] * z.v[i]; });
  }
  // Every load of these elements is behind us: results may lie where arguments were.
  if (op.x0.data) access.store(op.x0, x0);
  if (op.next_anchor.data) access.store(op.next_anchor, anchor);
  if (op.push.data) access.store(op.push, each([&](int i) { return r.u * x.v[i] + r.v * x0.v[i]; }));
  access.store(op.next, next);
  if (op.input.data) {
    const float c_in = op.table[(row + 1 < op.rows ? row + 1 : row) * LETTERS];
    access.store(op.input, each([&](int i) { return c_in * next.v[i]; }));
  }
}

// What the loss says of four elements: output - (f x0 + g z), and with a bound the divergence and its slope; all of
// them 0 beyond the end of a sample.
struct LossOfFour {
  Four difference, divergence, slope;
};

template <bool DRAWN, bool FLAT>
__device__ __forceinline__ LossOfFour loss_of(const DiffusionLoss& op, const Access<FLAT>& access) {
  const Four output = access.load(op.output), x0 = access.load(op.x0);
  const float f = of_sample(op.f, access.place.sample), g = of_sample(op.g, access.place.sample);
  const Four z = noise_at<DRAWN>(op.noise, access);
  LossOfFour loss = {};
  loss.difference = each([&](int i) {
    return i < access.place.count ? output.v[i] - (f * x0.v[i] + g * z.v[i]) : 0.0f;
  });
  if (!op.bound) return loss;
  const Bound k = op.bound[access.place.sample];
  const Four v = access.load(op.fraction);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i >= access.place.count) break;
    const float miss = x0.v[i] - (k.p * (k.alpha * x0.v[i] + k.sigma * z.v[i]) + k.q * output.v[i]);
    const Divergence d = divergence(v.v[i], k.lo, k.hi, k.b, miss);
    loss.divergence.v[i] = d.value, loss.slope.v[i] = d.slope;
  }
  return loss;
}

// A block has one chunk of one sample; the sums of the chunks are added in order after that, so that no run differs.
__device__ __forceinline__ float block_sum(float value) {
  __shared__ float warps[THREADS / 32];
#pragma unroll
  for (int distance = 16; distance; distance /= 2) value += __shfl_down_sync(0xFFFFFFFFu, value, distance);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  float total = 0.0f;
  for (int i = 0; i < THREADS / 32; ++i) total += warps[i];
  return total;
}

template <bool DRAWN, bool FLAT>
__global__ void __launch_bounds__(THREADS) loss_kernel(const __grid_constant__ DiffusionLoss op, int64_t chunks) {
  const int64_t sample = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
  const float weight = of_sample(op.weight, sample), bound = op.bound ? op.bound[sample].weight : 0.0f;
  float sum = 0.0f;
  for (int i = 0; i < CHUNK / (4 * THREADS); ++i) {
    const int64_t first = chunk * CHUNK + (i * THREADS + threadIdx.x) * 4, rest = op.space.elements - first;
    if (rest <= 0) break;
    const Place place{sample, first, FLAT || rest >= 4 ? 4 : int(rest)};
    const Access<FLAT> access(op.space, place);
    const LossOfFour loss = loss_of<DRAWN>(op, access);
    if (op.residual.data) access.store(op.residual, loss.difference);
    if (op.slope.data) access.store(op.slope, loss.slope);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      sum += weight * (loss.difference.v[j] * loss.difference.v[j]) + bound * loss.divergence.v[j];
  }
  const float total = block_sum(sum);
  if (threadIdx.x == 0) op.sums[blockIdx.x] = total;
}

__global__ void __launch_bounds__(THREADS) total_kernel(const __grid_constant__ DiffusionLoss op, int64_t chunks) {
  const int64_t sample = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (sample >= op.space.samples) return;
  double total = 0;
  for (int64_t i = 0; i < chunks; ++i) total += op.sums[sample * chunks + i];
  op.loss[sample] = float(total / double(op.space.elements));
}

// ---- launching ------------------------------------------------------------------------------

// Whether four elements are one aligned access.
bool vector(const Space& space, const Operand& operand) {
  if (!operand.data) return true;
  if (operand.type == Type::f64 || space.dims != 1 || operand.stride[0] != 1) return false;
  const int64_t bytes = operand.type == Type::f32 ? 4 : 2;
  return reinterpret_cast<uintptr_t>(operand.data) % (4 * bytes) == 0 && operand.sample % 4 == 0;
}

template <typename... Operands>
bool vectors(const Space& space, const Operands&... operands) {
  return space.elements % 4 == 0 && (vector(space, operands) && ...);
}

unsigned blocks(const Space& space) {
  return unsigned(((space.elements + 3) / 4 * space.samples + THREADS - 1) / THREADS);
}

template <typename Op>
int launch(void (*kernel)(Op), const Op& op, int device, void* stream) {
  if (op.space.elements == 0) return cudaSuccess;
  const Guard guard(device);
  kernel<<<blocks(op.space), THREADS, 0, static_cast<cudaStream_t>(stream)>>>(op);
  return cudaGetLastError();
}

}  // namespace

int normal(const Normal& op, int device, void* stream) {
  return launch(vectors(op.space, op.result) ? normal_kernel<true> : normal_kernel<false>, op, device, stream);
}

int add_noise(const AddNoise& op, int device, void* stream) {
  const bool flat = vectors(op.space, op.x0, op.noise.given, op.result);
  const auto drawn = flat ? add_noise_kernel<true, true> : add_noise_kernel<true, false>;
  const auto given = flat ? add_noise_kernel<false, true> : add_noise_kernel<false, false>;
  return launch(op.noise.drawn ? drawn : given, op, device, stream);
}

int guide(const Guide& op, int device, void* stream) {
  const bool flat = vectors(op.space, op.cond, op.uncond, op.result);
  return launch(flat ? guide_kernel<true> : guide_kernel<false>, op, device, stream);
}

int affine_step(const AffineStep& op, int device, void* stream) {
  const bool flat = vectors(op.space, op.x, op.output, op.fraction, op.uncond, op.history[0], op.history[1],
                            op.history[2], op.anchor, op.noise.given) &&
                    vectors(op.space, op.next, op.x0, op.push, op.next_anchor, op.input);
  const auto drawn = flat ? affine_step_kernel<true, true> : affine_step_kernel<true, false>;
  const auto given = flat ? affine_step_kernel<false, true> : affine_step_kernel<false, false>;
  return launch(op.noise.drawn ? drawn : given, op, device, stream);
}

int diffusion_loss(const DiffusionLoss& op, int device, void* stream_) {
  const Guard guard(device);
  const auto stream = static_cast<cudaStream_t>(stream_);
  const bool flat = vectors(op.space, op.output, op.fraction, op.x0, op.noise.given, op.residual, op.slope);
  const int64_t chunks = fastdiff::chunks(op.space.elements);
  const auto drawn = flat ? loss_kernel<true, true> : loss_kernel<true, false>;
  const auto given = flat ? loss_kernel<false, true> : loss_kernel<false, false>;
  const auto kernel = op.noise.drawn ? drawn : given;
  kernel<<<unsigned(chunks * op.space.samples), THREADS, 0, stream>>>(op, chunks);
  total_kernel<<<unsigned((op.space.samples + THREADS - 1) / THREADS), THREADS, 0, stream>>>(op, chunks);
  return cudaGetLastError();
}

const char* message(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace fastdiff::cuda
