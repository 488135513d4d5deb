// Whether a device can run this binary: the runtime is asked for one of its kernels, nothing is launched.
#include <cuda_runtime.h>

#include "executor.h"

namespace beagle::cuda {
namespace {

__global__ void any_kernel() {}

cudaError_t find_kernel(int device) {
  int before = 0;
  cudaFuncAttributes found;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  error = cudaFuncGetAttributes(&found, any_kernel);
  if (before != device) cudaSetDevice(before);
  return error;
}

std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

}  // namespace

std::string why_not(int device, const std::string& archs) {
  const cudaError_t error = find_kernel(device);
  if (error == cudaSuccess) return "";
  int driver = 0, runtime = 0, major = 0, minor = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  std::string told = std::string(cudaGetErrorString(error)) + " (built with CUDA " + version(runtime) + " for " + archs;
  told += driver == 0 ? "; no driver is here" : "; the driver serves CUDA " + version(driver);
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess) {
    told += ", the device is sm_" + std::to_string(major) + std::to_string(minor);
  }
  // or the next launch would be blamed for it
  cudaGetLastError();
  return told + ")";
}

}  // namespace beagle::cuda
