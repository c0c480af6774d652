// What PyTorch's C++ asks CUDA even where all tensors are fake, answered without a driver. benchmarks/fake_gpu.py compiles
// this and loads it ahead of PyTorch: its functions then come before those of the same names in PyTorch's libraries.
#include <driver_types.h>

#include <cstdio>

#define ANSWER __attribute__((visibility("default")))

// No device until fake_gpu(): only where there is none does PyTorch put in its device guard that does nothing.
static signed char devices = 0;
static cudaDeviceProp properties;  // zeros

extern "C" ANSWER void fake_gpu(const char* name, int major, int minor, int processors, int shared_memory) {
  snprintf(properties.name, sizeof properties.name, "%s", name);
  properties.major = major;
  properties.minor = minor;
  properties.multiProcessorCount = processors;
  properties.sharedMemPerBlockOptin = shared_memory;
  properties.warpSize = 32;
  properties.maxThreadsPerBlock = 1024;
  properties.maxThreadsPerMultiProcessor = 2048;
  devices = 127;  // at least as many as that guard says there are; torch.cuda.device_count() in Python says 1
}

namespace c10::cuda {
ANSWER signed char device_count() noexcept { return devices; }
ANSWER signed char device_count_ensure_non_zero() { return devices; }
ANSWER signed char current_device() { return 0; }
}  // namespace c10::cuda

namespace at::cuda {
ANSWER cudaDeviceProp* getCurrentDeviceProperties() { return &properties; }
ANSWER cudaDeviceProp* getDeviceProperties(signed char) { return &properties; }
}  // namespace at::cuda

// Of the driver itself: this library is loaded under the name libcuda.so.1. Before a backward pass autograd asks which
// devices have a context, to wait for their streams: none.
extern "C" ANSWER int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
  *flags = *active = 0;
  return 0;
}
