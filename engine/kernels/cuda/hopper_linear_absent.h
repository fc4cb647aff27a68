// Stands in for hopper_linear.h until that is there: takes no shape.
#pragma once

#include "engine/kernels/cuda/launch.h"
#include "engine/kernels/cuda/linear_args.h"

namespace tandem::engine::cuda {

struct HopperScratch {
  float* partial = nullptr;
  uint32_t* flags = nullptr;
};
inline size_t HopperPartialFloats(int) { return 0; }
inline size_t HopperFlags(int) { return 0; }
inline bool HopperSupports(int, int, int) { return false; }
inline int HopperSquareParts(int) { return 1; }
inline cudaError_t HopperGateUp(const GateUpArgs&, const HopperScratch&, const LaunchOptions&) {
  return cudaErrorNotSupported;
}
inline cudaError_t HopperQkv(const QkvArgs&, const HopperScratch&, const LaunchOptions&) {
  return cudaErrorNotSupported;
}
inline cudaError_t HopperResidual(const ResidualArgs&, const HopperScratch&, const LaunchOptions&) {
  return cudaErrorNotSupported;
}
inline cudaError_t HopperLogits(const LogitsArgs&, const HopperScratch&, const LaunchOptions&) {
  return cudaErrorNotSupported;
}

}  // namespace tandem::engine::cuda
