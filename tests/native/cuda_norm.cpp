// The CUDA kernels of the group norm on the host, to be called through ctypes by tests/test_cuda_norm.py.
#include "cuda/cuda_runtime.h"
// After it, for the order matters.
#include "cuda/norm.cu"

using namespace fastdiff;

extern "C" {

void use_device(int most, int whole, int multiprocessors, int clusters, int compiled) {
  emulated::device.most = most, emulated::device.whole = whole, emulated::device.multiprocessors = multiprocessors;
  emulated::device.clusters = clusters, emulated::device.compiled = compiled;
}

// A tensor: address, type, and the strides of a sample and of a channel.
struct Given {
  char* data;
  int64_t type, sample, channel;
};

// Sizes are samples, channels, positions, groups; tensors are x, residual, weight, bias, scale, shift, grad, result,
// sum. `told` gets what was launched. Returns 0, TOO_LARGE, or another number with a problem.
int group_norm(const int64_t* sizes, int last, int silu, float eps, const Given* tensors, float* moments, float* sums,
               int device, int order, emulated::Launched* told) {
  GroupNorm op;
  op.samples = sizes[0], op.channels = sizes[1], op.positions = sizes[2], op.groups = sizes[3];
  op.channels_last = last, op.silu = silu, op.eps = eps, op.moments = moments, op.sums = sums;
  Operand* operands[] = {&op.x,    &op.residual, &op.weight, &op.bias, &op.scale,
                         &op.shift, &op.grad,     &op.result, &op.sum};
  for (int i = 0; i < 9; ++i) {
    Operand& operand = *operands[i];
    operand.data = tensors[i].data, operand.type = Type(tensors[i].type);
    operand.sample = tensors[i].sample, operand.stride[0] = tensors[i].channel;
  }
  emulated::launched = {}, emulated::device.order = order;
  const int error = cuda::group_norm(op, device, nullptr);
  *told = emulated::launched;
  return error;
}

}  // extern "C"
