// Group norm with what surrounds it in a U-Net on a CUDA device, forward and backward.
//
// A cluster of blocks has some whole groups of a sample, each of its blocks a run of their positions, which it keeps in
// shared memory: device memory is read once and written once. Where that is too small, a block goes through tiles of
// its run and reads them again for the result; before compute capability 9.0 a cluster is one block.
//
// A tile's variance is taken about the tile's own mean, and what tiles and blocks found is merged by its differences:
// nothing cancels, whatever the values. All sums have a fixed order.
#include "kernels.h"
#include "work.h"

namespace fastdiff::cuda {
namespace {

// ---- forward ------------------------------------------------------------------------------------

// Of `count` numbers: the mean is near + rest, `squares` is the sum of the squared differences from it.
struct Moments {
  float count, near, rest, squares;
};

__device__ __forceinline__ Moments merged(const Moments& a, const Moments& b) {
  if (b.count == 0.0f) return a;
  if (a.count == 0.0f) return b;
  const float apart = (b.near - a.near) + (b.rest - a.rest), count = a.count + b.count, part = b.count / count;
  const float more = apart * apart * part * a.count;
  return {count, a.near, fma(apart, part, a.rest), a.squares + b.squares + more};
}

template <typename A, bool LAST>
__global__ void __launch_bounds__(THREADS, 3)
    forward_kernel(const __grid_constant__ GroupNorm op, const __grid_constant__ Tiling tiling) {
  using Word = typename A::Word;
  constexpr int CHANNELS = Work<A, LAST>::CHANNELS, COUNT = A::COUNT;
  const Work<A, LAST> work(op, tiling);
  const int groups = work.groups, several = tiling.slots * work.cells;
  Word* slice = reinterpret_cast<Word*>(shared_memory());
  float *partial = reinterpret_cast<float*>(slice + tiling.words), *second = partial + several;
  float *gain = second + several, *offset = gain + tiling.channels, *center = offset + tiling.channels;
  float *found = center + groups, *mean = found + 3 * groups, *rest = mean + groups, *inverse = rest + groups;
  const int64_t x0 = work.sample * op.x.sample, r0 = work.sample * op.residual.sample;
  const bool with_residual = op.residual.data, kept = work.kept();

  struct Terms {
    Word x, r;
  };
  const auto load = [&](int64_t at) {
    Terms terms = {};
    terms.x = A::load(op.x, x0 + at);
    if (with_residual) terms.r = A::load(op.residual, r0 + at);
    return terms;
  };
  const auto sum = [&](const Terms& terms) {
    return with_residual ? A::sum(terms.x, terms.r, op.x.type) : terms.x;
  };

  work.read_affine(gain, offset);
  Moments before = {};  // of the tiles so far: the counts are the same for every group, the rest is in `found`
  for (int i = int(threadIdx.x); i < 3 * groups; i += tiling.threads) found[i] = 0.0f;
  work.each_tile([&](int64_t from, int count) {
    work.each_item([&](int item, bool is_item) {
      Values<CHANNELS> a = {};
      if (is_item)
        work.template walk<3>(item, from, count, [&](int64_t at, int) { return load(at); },
                              [&](const Terms& terms, int64_t at, int word) {
          const Word h = sum(terms);
          slice[word] = h;
          if (op.sum.data) A::store(op.sum, work.sample * op.sum.sample + at, h);
          const Values<COUNT> x = A::unpack(h);
#pragma unroll
          for (int i = 0; i < COUNT; ++i) a.v[LAST ? i : 0] += x.v[i];
        });
      work.put(partial, item, is_item, a);
    });
    const float n = float(work.width) * float(count);
    const int wide = work.width >> tiling.fold;  // cells of a group
    __syncthreads();
    work.join_slots(partial);
    __syncthreads();
    work.each_group_of_warp([&](int group) {
      const float all = work.sum_of_warp(wide, [&](int i) { return partial[group * wide + i]; });
      if (work.leads_warp()) center[group] = all / n;
    });
    __syncthreads();
    work.each_item([&](int item, bool is_item) {
      Values<CHANNELS> near, a = {}, b = {};
      if (is_item) {
        work.each_channel(item, [&](int i, int, int group) { near.v[i] = center[group]; });
        work.template walk<2>(item, from, count, [&](int64_t, int word) { return slice[word]; },
                              [&](const Word& h, int64_t, int) {
          const Values<COUNT> x = A::unpack(h);
#pragma unroll
          for (int i = 0; i < COUNT; ++i) {
            const int c = LAST ? i : 0;
            const float d = x.v[i] - near.v[c];
            a.v[c] += d, b.v[c] = fma(d, d, b.v[c]);
          }
        });
      }
      work.put(partial, item, is_item, a);
      work.put(second, item, is_item, b);
    });
    __syncthreads();
    work.join_slots(partial);
    work.join_slots(second);
    __syncthreads();
    work.each_group_of_warp([&](int group) {
      const float all = work.sum_of_warp(wide, [&](int i) { return partial[group * wide + i]; });
      const float squares = work.sum_of_warp(wide, [&](int i) { return second[group * wide + i]; });
      if (!work.leads_warp()) return;
      float* of_group = found + 3 * group;
      const float over = all / n;
      const Moments m = merged({before.count, of_group[0], of_group[1], of_group[2]},
                               {n, center[group], over, fma(-all, over, squares)});
      of_group[0] = m.near, of_group[1] = m.rest, of_group[2] = m.squares;
    });
    before.count += n;
    __syncthreads();
  });
  meet(tiling.ranks);
  for (int group = int(threadIdx.x); group < groups; group += tiling.threads) {
    Moments m = {};
    for (int r = 0; r < tiling.ranks; ++r) {
      const float* other = of_rank(found + 3 * group, r, tiling.ranks);
      const float n = float(work.width) * float(work.positions_before(r + 1) - work.positions_before(r));
      m = merged(m, {n, other[0], other[1], other[2]});
    }
    const float variance = m.squares / m.count;
    mean[group] = m.near, rest[group] = m.rest;
    inverse[group] = 1.0f / root((variance < 0.0f ? 0.0f : variance) + op.eps);
    if (op.moments && work.rank == 0) {
      float* to = op.moments + 2 * (work.sample * op.groups + work.channel / work.width + group);
      to[0] = m.near + m.rest, to[1] = inverse[group];
    }
  }
  __syncthreads();
  const int64_t y0 = work.sample * op.result.sample;
  work.each_item([&](int item, bool is_item) {
    if (!is_item) return;
    Values<CHANNELS> near, a, b;
    work.each_channel(item, [&](int i, int c, int group) {
      near.v[i] = mean[group], a.v[i] = inverse[group] * gain[c], b.v[i] = fma(-rest[group], a.v[i], offset[c]);
    });
    work.each_tile([&](int64_t from, int count) {
      work.template walk<2>(item, from, count, [&](int64_t at, int word) { return kept ? slice[word] : sum(load(at)); },
                            [&](const Word& h, int64_t at, int) {
        Values<COUNT> x = A::unpack(h);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
          const int c = LAST ? i : 0;
          const float z = fma(x.v[i] - near.v[c], a.v[c], b.v[c]);
          x.v[i] = op.silu ? z * A::sigmoid(z) : z;
        }
        A::store(op.result, y0 + at, A::pack(x));
      });
    });
  });
  if (tiling.ranks > 1) meet(tiling.ranks);  // the others may still be reading what was found here
}

// ---- backward -----------------------------------------------------------------------------------

// The gradient of z from that of its activation.
template <typename A>
__device__ __forceinline__ float slope(float grad, float z, bool silu) {
  if (!silu) return grad;
  const float s = A::sigmoid(z);
  return grad * (s * fma(z, 1.0f - s, 1.0f));
}

template <typename A, bool LAST>
__global__ void __launch_bounds__(THREADS, 2)
    backward_kernel(const __grid_constant__ GroupNorm op, const __grid_constant__ Tiling tiling) {
  using Word = typename A::Word;
  constexpr int CHANNELS = Work<A, LAST>::CHANNELS, COUNT = A::COUNT;
  const Work<A, LAST> work(op, tiling);
  const int groups = work.groups, channels = tiling.channels, several = tiling.slots * channels;
  Word *slice = reinterpret_cast<Word*>(shared_memory()), *slopes = slice + tiling.words;
  float *partial = reinterpret_cast<float*>(slopes + tiling.words), *second = partial + several;
  float *gain = second + several, *offset = gain + channels, *made = offset + channels;
  float *mean = made + 2 * channels, *inverse = mean + groups, *part = inverse + groups, *shares = part + 2 * groups;
  const int64_t x0 = work.sample * op.x.sample, g0 = work.sample * op.grad.sample;
  const int64_t m0 = work.sample * op.residual.sample;
  const bool kept = work.kept(), with_more = op.residual.data;

  struct Terms {
    Word h, grad, more;
  };
  struct Affine {
    Values<CHANNELS> mean, inverse, gain, offset;
  };
  const auto affine_of = [&](int item) {
    Affine k;
    work.each_channel(item, [&](int i, int c, int group) {
      k.mean.v[i] = mean[group], k.inverse.v[i] = inverse[group], k.gain.v[i] = gain[c], k.offset.v[i] = offset[c];
    });
    return k;
  };

  work.read_affine(gain, offset);
  const float* moments = op.moments + 2 * (work.sample * op.groups + work.channel / work.width);
  for (int group = int(threadIdx.x); group < groups; group += tiling.threads)
    mean[group] = moments[2 * group], inverse[group] = moments[2 * group + 1];
  for (int i = int(threadIdx.x); i < 2 * channels; i += tiling.threads) made[i] = 0.0f;
  __syncthreads();
  work.each_tile([&](int64_t from, int count) {
    work.each_item([&](int item, bool is_item) {
      Values<CHANNELS> a = {}, b = {};
      if (is_item) {
        const Affine k = affine_of(item);
        work.template walk<2>(item, from, count, [&](int64_t at, int) {
          Terms terms = {};
          terms.h = A::load(op.x, x0 + at), terms.grad = A::load(op.grad, g0 + at);
          return terms;
        }, [&](const Terms& terms, int64_t, int word) {
          const Values<COUNT> x = A::unpack(terms.h);
          Values<COUNT> dz = A::unpack(terms.grad);
#pragma unroll
          for (int i = 0; i < COUNT; ++i) {
            const int c = LAST ? i : 0;
            const float xhat = (x.v[i] - k.mean.v[c]) * k.inverse.v[c];
            dz.v[i] = slope<A>(dz.v[i], fma(xhat, k.gain.v[c], k.offset.v[c]), op.silu);
            a.v[c] += dz.v[i], b.v[c] = fma(dz.v[i], xhat, b.v[c]);
          }
          slice[word] = terms.h, slopes[word] = A::WIDE ? A::pack(dz) : terms.grad;
        });
      }
      work.put(partial, item, is_item, a);
      work.put(second, item, is_item, b);
    });
    __syncthreads();
    for (int c = int(threadIdx.x); c < channels; c += tiling.threads)
      made[c] += work.slots_of(partial, c), made[channels + c] += work.slots_of(second, c);
    __syncthreads();
  });
  work.each_group_of_warp([&](int group) {
    const int c0 = group * work.width;
    const float plain = work.sum_of_warp(work.width, [&](int i) { return gain[c0 + i] * made[c0 + i]; });
    const float along = work.sum_of_warp(work.width, [&](int i) { return gain[c0 + i] * made[channels + c0 + i]; });
    if (work.leads_warp()) part[2 * group] = plain, part[2 * group + 1] = along;
  });
  meet(tiling.ranks);
  const auto over_ranks = [&](const float* place) {
    float total = 0.0f;
    for (int r = 0; r < tiling.ranks; ++r) total += *of_rank(place, r, tiling.ranks);
    return total;
  };
  float* sums = op.sums + 2 * (work.sample * op.channels + work.channel);
  for (int i = work.rank * tiling.threads + int(threadIdx.x); i < 2 * channels; i += tiling.ranks * tiling.threads)
    sums[i] = over_ranks(made + (i % 2) * channels + i / 2);
  const float n = float(work.width) * float(op.positions);
  for (int i = int(threadIdx.x); i < 2 * groups; i += tiling.threads) shares[i] = over_ranks(part + i) / n;
  __syncthreads();
  const int64_t d0 = work.sample * op.result.sample;
  work.each_item([&](int item, bool is_item) {
    if (!is_item) return;
    const Affine k = affine_of(item);
    Values<CHANNELS> plain, along;
    work.each_channel(item, [&](int i, int, int group) {
      plain.v[i] = shares[2 * group], along.v[i] = shares[2 * group + 1];
    });
    work.each_tile([&](int64_t from, int count) {
      work.template walk<2>(item, from, count, [&](int64_t at, int word) {
        Terms terms = {};
        terms.h = kept ? slice[word] : A::load(op.x, x0 + at);
        terms.grad = kept ? slopes[word] : A::load(op.grad, g0 + at);
        if (with_more) terms.more = A::load(op.residual, m0 + at);
        return terms;
      }, [&](const Terms& terms, int64_t at, int) {
        const Values<COUNT> x = A::unpack(terms.h), grad = A::unpack(terms.grad), more = A::unpack(terms.more);
        Values<COUNT> dx;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
          const int c = LAST ? i : 0;
          const float xhat = (x.v[i] - k.mean.v[c]) * k.inverse.v[c];
          const float dz = A::WIDE && kept ? grad.v[i]
                                           : slope<A>(grad.v[i], fma(xhat, k.gain.v[c], k.offset.v[c]), op.silu);
          dx.v[i] = k.inverse.v[c] * fma(-xhat, along.v[c], fma(k.gain.v[c], dz, -plain.v[c]));
          if (with_more) dx.v[i] += more.v[i];
        }
        A::store(op.result, d0 + at, A::pack(dx));
      });
    });
  });
  if (tiling.ranks > 1) meet(tiling.ranks);  // the others may still be reading what was made here
}

// ---- launching ----------------------------------------------------------------------------------

template <typename A>
int launch(const GroupNorm& op, Layout layout, int device, void* stream) {
  using Kernel = void (*)(GroupNorm, Tiling);
  const bool backward = op.grad.data;
  const Kernel forward_of_layout = layout.last ? forward_kernel<A, true> : forward_kernel<A, false>;
  const Kernel kernel = !backward     ? forward_of_layout
                        : layout.last ? backward_kernel<A, true>
                                      : backward_kernel<A, false>;
  layout.count = A::COUNT, layout.word = int(sizeof(typename A::Word));
  const Guard guard(device);
  Limits limits;
  const int error = limits_of(reinterpret_cast<const void*>(kernel), backward, device, limits);
  if (error != cudaSuccess) return error;
  Tiling tiling;
  if (!divide(op, layout, limits, tiling)) return TOO_LARGE;
  const int64_t blocks = op.channels / tiling.channels * tiling.ranks, most = std::max<int64_t>(INT_MAX / blocks, 1);
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = unsigned(tiling.ranks), cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(unsigned(tiling.threads)), config.dynamicSmemBytes = size_t(tiling.bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster, config.numAttrs = tiling.ranks > 1;
  for (tiling.first = 0; tiling.first < op.samples; tiling.first += most) {
    config.gridDim = dim3(unsigned(std::min(most, op.samples - tiling.first) * blocks));
    cudaLaunchKernelEx(&config, kernel, op, tiling);
  }
  return cudaGetLastError();
}

}  // namespace

int group_norm(const GroupNorm& op, int device, void* stream) {
  Layout layout = {};
  layout.last = op.channels_last, layout.size = op.x.type == Type::f32 ? 4 : 2;
  const int64_t count = 16 / layout.size;
  bool vectors = (op.channels_last ? op.channels : op.positions) % count == 0;
  for (const Operand* operand : {&op.x, &op.residual, &op.grad, &op.result, &op.sum})
    vectors = vectors && reinterpret_cast<uintptr_t>(operand->data) % 16 == 0 &&
              (op.samples == 1 || operand->sample % count == 0);
  if (!vectors) return launch<Single>(op, layout, device, stream);
  if (op.x.type == Type::f32) return launch<Vector<Type::f32>>(op, layout, device, stream);
  if (op.x.type == Type::bf16) return launch<Vector<Type::bf16>>(op, layout, device, stream);
  return launch<Vector<Type::f16>>(op, layout, device, stream);
}

}  // namespace fastdiff::cuda
