// Tensors without torch's headers: DLPack's C interface (dmlc/dlpack, version 1), which torch.Tensor carries as
// __dlpack_c_exchange_api__. Only what is read here is declared.
#pragma once

#include <cstdint>

namespace fastdiff {

enum DeviceType : int32_t { CPU = 1, CUDA = 2 };
enum TypeCode : uint8_t { CODE_INT = 0, CODE_FLOAT = 2, CODE_BFLOAT = 4 };

struct Device {
  int32_t type, index;
};

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* base;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;

  char* data() const { return static_cast<char*>(base) + byte_offset; }
};

struct ExchangeApi {
  struct {
    uint32_t major, minor;
    void* previous;
  } header;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*tensor_from_object)(void* object, Tensor* tensor);
  int (*current_stream)(int32_t device_type, int32_t index, void** stream);
};

}  // namespace fastdiff
