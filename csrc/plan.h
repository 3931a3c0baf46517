// A call's tensors and numbers as the kernels take them: Python objects are looked at here and nowhere else.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <initializer_list>
#include <string>

#include "operand.h"
#include "tensor.h"

namespace py = pybind11;

namespace fastdiff {
namespace {

constexpr int64_t MOST_TOGETHER = 256;  // elements of a sample: more fill the lanes by themselves
constexpr int64_t MOST_CHANNELS = 256;  // of a walk, channels last, in which noise is drawn a channel at a time
constexpr int64_t BEYOND_CACHE = 32 << 20;  // bytes of a call that no cache keeps until the next

const ExchangeApi* api = nullptr;
PyTypeObject* tensor_type = nullptr;
PyObject* is_neg = nullptr;  // torch.Tensor.is_neg

[[noreturn]] void refuse(const std::string& message) { throw py::value_error(message); }

// Storage that was given up lies at 0, and a view of it as far behind as it began; few tensors lie so low.
bool is_freed(py::handle object, const Tensor& tensor) {
  const bool low = reinterpret_cast<uintptr_t>(tensor.base) < uintptr_t(1) << 40;
  return !tensor.base || (low && object.attr("untyped_storage")().attr("nbytes")().cast<int64_t>() == 0);
}

Tensor tensor_of(py::handle object, const char* name) {
  if (!PyObject_TypeCheck(object.ptr(), tensor_type)) refuse(std::string(name) + " must be a tensor");
  Tensor tensor;
  if (api->tensor_from_object(object.ptr(), &tensor) != 0) throw py::error_already_set();
  int64_t elements = 1;
  for (int d = 0; d < tensor.ndim; ++d) elements *= tensor.shape[d];
  if (elements && is_freed(object, tensor)) refuse(std::string(name) + " holds no values");
  return tensor;
}

bool absent(py::handle object) { return object.is_none(); }

bool is_address(py::handle noise) { return PyTuple_Check(noise.ptr()); }

Type type_of(const Tensor& tensor, const char* name) {
  const DataType d = tensor.dtype;
  if (d.code == CODE_FLOAT && d.bits == 32) return Type::f32;
  if (d.code == CODE_FLOAT && d.bits == 64) return Type::f64;
  if (d.code == CODE_FLOAT && d.bits == 16) return Type::f16;
  if (d.code == CODE_BFLOAT && d.bits == 16) return Type::bf16;
  refuse(std::string(name) + " must be float32, float64, bfloat16 or float16");
}

int64_t size_of(Type type) { return type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2; }

// Gathers the operands of one call, decides the order in which they are walked, and joins the dimensions that are
// one piece in all of them.
class Plan {
 public:
  // A CUDA thread makes a quad of noise, four row-major elements: there, noise decides the order.
  explicit Plan(const Tensor& lead, bool drawn = false, int least_dims = 1)
      : device_(lead.device), dims_(lead.ndim - 1) {
    if (dims_ < least_dims || dims_ > MAX_DIMS)
      refuse("tensors of 2 to " + std::to_string(MAX_DIMS + 1) + " dimensions only");
    if (device_.type != CPU && device_.type != CUDA) refuse("tensors must be on the CPU or on a CUDA device");
    samples_ = lead.shape[0];
    for (int d = 0; d < dims_; ++d) shape_[d] = lead.shape[d + 1], order_[d] = d;
    if (channels_last(lead) && !(drawn && (device_.type == CUDA || shape_[0] > MOST_CHANNELS))) std::rotate(order_, order_ + 1, order_ + dims_);
  }

  // A tensor of the lead's shape; or with `wide`, of so many times its channels, of which this is part `part`.
  void add(Operand& operand, py::handle object, const char* name, int part = 0, bool wide = false) {
    add(operand, object, tensor_of(object, name), name, part, wide);
  }

  void add(Operand& operand, py::handle object, const Tensor& tensor, const char* name, int part, bool wide) {
    bool fits = tensor.ndim == dims_ + 1 && tensor.shape[0] == samples_;
    for (int d = 0; d < dims_ && fits; ++d) fits = tensor.shape[d + 1] == shape_[d] * (wide && d == 0 ? 2 : 1);
    if (!fits) refuse(std::string(name) + " has the wrong shape");
    check_device(tensor, name);
    operand.type = type_of(tensor, name);
    operand.sample = tensor.strides[0];
    int64_t offset = 0;
    if (part) offset = shape_[0] * tensor.strides[1];
    if (is_negated(object)) refuse(std::string(name) + " is a view that is yet to be negated");
    operand.data = tensor.data() + offset * size_of(operand.type);
    for (int d = 0; d < dims_; ++d) operand.stride[d] = tensor.strides[order_[d] + 1];
    remember(operand);
    take(tensor, &operand);
  }

  void add_optional(Operand& operand, py::handle object, const char* name, int part = 0, bool wide = false) {
    if (!absent(object)) add(operand, object, name, part, wide);
  }

  // A tensor that is written, or None: dense, and apart from all that was added before it, unless it is exactly one of
  // those that it may lie over.
  void add_result(Operand& operand, py::handle object, const char* name,
                  std::initializer_list<const Operand*> may_lie_over = {}) {
    if (absent(object)) return;
    const Tensor tensor = tensor_of(object, name);
    if (!is_dense(tensor)) refuse(std::string(name) + " must be contiguous or channels-last");
    add(operand, object, tensor, name, 0, false);
    const auto lies_over = [&](const Operand* other) { return other && other->data && same_place(operand, *other); };
    const bool allowed = std::any_of(may_lie_over.begin(), may_lie_over.end(), lies_over);
    check_apart(name, [&](const Operand* other) { return allowed && lies_over(other); });
  }

  void add_noise(Noise& noise, py::handle object);

  Scalar scalar(py::handle object, const char* name) {
    Scalar scalar;
    if (!PyObject_TypeCheck(object.ptr(), tensor_type)) {
      scalar.value = object.cast<float>();
      return scalar;
    }
    const Tensor tensor = tensor_of(object, name);
    check_device(tensor, name);
    const Type type = type_of(tensor, name);
    if (type != Type::f32 && type != Type::f64) refuse(std::string(name) + " must be float32 or float64");
    scalar.wide = type == Type::f64;
    scalar.stride = per_sample(tensor, name);
    scalar.each = tensor.data();
    take(tensor);
    return scalar;
  }

  Index index(py::handle object, const char* name) {
    Index index;
    if (!PyObject_TypeCheck(object.ptr(), tensor_type)) {
      index.value = object.cast<int64_t>();
      return index;
    }
    const Tensor tensor = tensor_of(object, name);
    check_device(tensor, name);
    if (tensor.dtype.code != CODE_INT || tensor.dtype.bits != 64) refuse(std::string(name) + " must be int64");
    index.stride = per_sample(tensor, name);
    index.each = reinterpret_cast<const int64_t*>(tensor.data());
    take(tensor);
    return index;
  }

  // A contiguous float32 array of a shape; one that is written is apart from all that was added before it.
  float* array(py::handle object, std::initializer_list<int64_t> shape, const char* name, bool written = false) {
    const Tensor tensor = tensor_of(object, name);
    check_device(tensor, name);
    bool fits = tensor.ndim == int(shape.size()) && type_of(tensor, name) == Type::f32;
    int64_t expected = 1;
    for (int d = tensor.ndim - 1; fits && d >= 0; --d) {
      fits = tensor.shape[d] == shape.begin()[d] && (tensor.shape[d] == 1 || tensor.strides[d] == expected);
      expected *= tensor.shape[d];
    }
    if (!fits) {
      std::string sizes;
      for (int64_t size : shape) sizes += (sizes.empty() ? "" : ", ") + std::to_string(size);
      refuse(std::string(name) + " must be contiguous float32 [" + sizes + "]");
    }
    take(tensor);
    if (written) check_apart(name, [](const Operand*) { return false; });
    return reinterpret_cast<float*>(tensor.data());
  }

  void check_device(const Tensor& tensor, const char* name) const {
    if (tensor.device.type != device_.type || tensor.device.index != device_.index)
      refuse(std::string(name) + " is on another device");
  }

  // `uniform`: nothing but position, and the noise where it is drawn, tells one sample from another, so all of them may
  // be walked as one; on the CPU that is done with noise too if samples are small.
  Space space(bool uniform, Noise* noise = nullptr) {
    Space space;
    space.samples = samples_, space.elements = elements();
    mark_flat();
    join(space);
    if (device_.type == CUDA && (space.dims > 2 || space.elements > UINT32_MAX))
      refuse("tensors on a CUDA device must be contiguous or channels-last, with samples of less than 2^32 elements");
    space.streamed = samples_ * space.elements * count_ * int64_t(sizeof(float)) > BEYOND_CACHE;
    bool one_piece = uniform;
    if (noise && noise->drawn) {
      const bool alike = device_.type == CPU && !noise->seed.stride && !noise->step.stride;
      one_piece = one_piece && alike && space.elements < MOST_TOGETHER;
      noise->element.sample = space.elements;
    }
    for (int i = 0; i < count_; ++i)
      one_piece = one_piece && operands_[i]->flat && operands_[i]->sample == space.elements;
    if (one_piece && samples_ > 0) {
      if (noise && noise->drawn) noise->together = space.elements;
      space.elements *= samples_, space.samples = 1, space.dims = 1, space.size[0] = space.elements;
      for (int i = 0; i < count_; ++i) operands_[i]->stride[0] = 1;
    }
    return space;
  }

  // The walk of tensors that lie alike and without gaps within a sample; whether channels come last in it.
  bool dense(Space& walk) {
    walk = space(false);
    bool alike = walk.dims == 1;
    for (int i = 0; i < count_; ++i) alike = alike && (walk.elements <= 1 || operands_[i]->stride[0] == 1);
    if (!alike && samples_ * elements() > 0) refuse("tensors must all be contiguous, or all channels-last");
    return order_[0] != 0;
  }

  // Numbers by channel [C], or by sample and channel [N, C].
  void add_vector(Operand& operand, py::handle object, const char* name, bool per_sample) {
    if (absent(object)) return;
    const Tensor tensor = tensor_of(object, name);
    check_device(tensor, name);
    const bool fits = tensor.ndim == (per_sample ? 2 : 1) && tensor.shape[tensor.ndim - 1] == shape_[0] &&
                      (!per_sample || tensor.shape[0] == samples_);
    if (!fits) refuse(std::string(name) + " has the wrong shape");
    if (is_negated(object)) refuse(std::string(name) + " is a view that is yet to be negated");
    operand.data = tensor.data(), operand.type = type_of(tensor, name);
    operand.sample = per_sample ? tensor.strides[0] : 0, operand.stride[0] = tensor.strides[tensor.ndim - 1];
    take(tensor);
  }

  int64_t samples() const { return samples_; }

  int64_t elements() const {
    int64_t total = 1;
    for (int d = 0; d < dims_; ++d) total *= shape_[d];
    return total;
  }
  Device device() const { return device_; }

 private:
  int64_t per_sample(const Tensor& tensor, const char* name) const {
    if (tensor.ndim == 0) return 0;
    if (tensor.ndim != 1 || tensor.shape[0] != samples_) refuse(std::string(name) + " must hold one value per sample");
    return tensor.strides[0];
  }

  bool channels_last(const Tensor& lead) const {
    if (dims_ < 2 || shape_[0] == 1) return false;
    int64_t expected = 1;
    bool last = lead.strides[1] == 1, first = true;
    for (int d = dims_; d >= 1; --d) {
      if (shape_[d - 1] != 1 && lead.strides[d] != expected) first = false;
      expected *= shape_[d - 1];
    }
    expected = shape_[0];
    for (int d = dims_; d >= 2; --d) {
      if (shape_[d - 1] != 1 && lead.strides[d] != expected) last = false;
      expected *= shape_[d - 1];
    }
    return last && !first;
  }

  // Contiguous or channels-last, the batch outermost.
  static bool is_dense(const Tensor& tensor) {
    bool first = true, last = tensor.ndim == 4 || tensor.ndim == 5;
    int64_t row_major = 1, channels_last = tensor.ndim > 1 ? tensor.shape[1] : 1;
    for (int d = tensor.ndim - 1; d >= 0; --d) {
      const bool lone = tensor.shape[d] == 1;
      first = first && (lone || tensor.strides[d] == row_major);
      last = last && (lone || tensor.strides[d] == (d == 1 ? 1 : channels_last));
      row_major *= tensor.shape[d];
      if (d != 1) channels_last *= tensor.shape[d];
    }
    return first || last || row_major == 0;
  }

  static bool is_negated(py::handle object) {
    const auto answer = py::reinterpret_steal<py::object>(PyObject_CallOneArg(is_neg, object.ptr()));
    if (!answer) throw py::error_already_set();
    return answer.ptr() == Py_True;
  }

  bool same_place(const Operand& a, const Operand& b) const {
    bool same = a.data == b.data && a.type == b.type && (samples_ == 1 || a.sample == b.sample);
    for (int d = 0; d < dims_; ++d) same = same && (shape_[order_[d]] == 1 || a.stride[d] == b.stride[d]);
    return same;
  }

  void remember(Operand& operand) { operands_[count_++] = &operand; }

  void take(const Tensor& tensor, const Operand* operand = nullptr) {
    int64_t elements = 1, last = 0;
    for (int d = 0; d < tensor.ndim; ++d) elements *= tensor.shape[d], last += (tensor.shape[d] - 1) * tensor.strides[d];
    const int64_t size = tensor.dtype.bits / 8;
    taken_[taken_count_++] = {tensor.data(), tensor.data() + (elements ? (last + 1) * size : 0), operand};
  }

  // What was taken last shares no memory with what was taken before it, where that is not allowed.
  template <typename F>
  void check_apart(const char* name, F allowed) const {
    const Piece& last = taken_[taken_count_ - 1];
    for (const Piece* other = taken_; other != &last; ++other)
      if (last.low < other->high && other->low < last.high && !allowed(other->operand))
        refuse(std::string(name) + " shares memory with another argument");
  }

  // The bytes from the first to behind the last element of an argument.
  struct Piece {
    const char *low, *high;
    const Operand* operand;
  };

  void mark_flat() {
    for (int i = 0; i < count_; ++i) {
      Operand& operand = *operands_[i];
      int64_t expected = 1;
      operand.flat = operand.type == Type::f32;
      for (int d = dims_ - 1; d >= 0; --d) {
        const int64_t size = shape_[order_[d]];
        if (size != 1 && operand.stride[d] != expected) operand.flat = false;
        expected *= size;
      }
    }
  }

  void join(Space& space) {
    for (int d = 0; d < dims_; ++d) {
      const int64_t size = shape_[order_[d]];
      if (size == 1) continue;
      bool joins = space.dims > 0;
      for (int i = 0; i < count_ && joins; ++i)
        joins = operands_[i]->stride[space.dims - 1] == operands_[i]->stride[d] * size;
      if (joins) --space.dims;
      for (int i = 0; i < count_; ++i) operands_[i]->stride[space.dims] = operands_[i]->stride[d];
      space.size[space.dims] = joins ? space.size[space.dims] * size : size;
      ++space.dims;
    }
    if (space.dims == 0) {
      space.dims = 1, space.size[0] = 1;
      for (int i = 0; i < count_; ++i) operands_[i]->stride[0] = 1;
    }
  }

  Device device_;
  int dims_;
  int64_t samples_, shape_[MAX_DIMS];
  int order_[MAX_DIMS];
  Operand* operands_[16];
  int count_ = 0;
  Piece taken_[24];
  int taken_count_ = 0;
};

// A tensor, or the address (seed, step, sample, stream).
void Plan::add_noise(Noise& noise, py::handle object) {
  if (!is_address(object)) return add(noise.given, object, "noise");  // None is refused
  const py::tuple address = py::reinterpret_borrow<py::tuple>(object);
  if (address.size() != 4) refuse("a noise address is (seed, step, sample, stream)");
  noise.drawn = true;
  noise.seed = index(address[0], "seed");
  noise.step = index(address[1], "step");
  const bool seed_each = noise.seed.each && tensor_of(address[0], "seed").ndim > 0;
  noise.numbered = absent(address[2]) && !seed_each;
  if (!absent(address[2])) noise.sample = index(address[2], "sample");
  noise.stream = address[3].cast<uint32_t>();
  int64_t expected[MAX_DIMS], total = 1;
  for (int d = dims_ - 1; d >= 0; --d) expected[d] = total, total *= shape_[d];
  for (int d = 0; d < dims_; ++d) noise.element.stride[d] = expected[order_[d]];
  remember(noise.element);
}

}  // namespace
}  // namespace fastdiff
