// The ways to compute that this build has: a device and the ops of a model on it.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

#include "engine/device/collective.h"
#include "engine/device/device.h"
#include "engine/kernels/ops.h"

namespace tandem::engine {

struct BackendOptions {
  int num_threads = 0;  // cpu: compute threads; 0: one per physical core
  int gpu = 0;          // cuda: its number among the cards that CUDA_VISIBLE_DEVICES leaves
};

// What --max-num-batched-tokens and --max-num-seqs are where nobody gives them.
struct BatchDefaults {
  int max_num_batched_tokens = 0;
  int max_num_seqs = 0;
};

class Backend {
 public:
  virtual ~Backend() = default;

  virtual std::string name() const = 0;  // a value of --device
  virtual Device& device() = 0;
  // For one model; the backend outlives them. RESOURCE_EXHAUSTED where there is no room for their
  // scratch memory.
  virtual absl::StatusOr<std::unique_ptr<Ops>> MakeOps(const OpsShape& shape) = 0;
  // The ranks of a model, one on each of `all`, which are backends of this kind, outlive them and
  // have made nothing yet. Errors say which devices cannot work together.
  virtual absl::StatusOr<std::unique_ptr<Ranks>> MakeRanks(std::span<Backend* const> /*all*/) {
    return absl::UnimplementedError(name() + " has no ranks");
  }
  // Steps that a loop should keep launched: more than one only pays where the device is
  // asynchronous.
  virtual int max_in_flight() const = 0;
  // Arrivals and cancels wait for the end of a step, which on a CPU is long.
  virtual BatchDefaults batch_defaults() const { return {512, 64}; }
};

// One value of --device. `open` says in its error what is missing on this machine.
struct BackendEntry {
  std::string name;
  absl::StatusOr<std::unique_ptr<Backend>> (*open)(const BackendOptions& options);
};

// In the order in which "auto" tries them; the last one can always be opened.
const std::vector<BackendEntry>& Backends();

// The backend of that name, or with "auto" the first that can be opened; why those before it cannot
// is logged. INVALID_ARGUMENT for a name that this build does not have, and, whatever the name, for
// options that a device refuses.
absl::StatusOr<std::unique_ptr<Backend>> OpenBackend(const std::string& name,
                                                     const BackendOptions& options);

// cpu_backend.cc
absl::StatusOr<std::unique_ptr<Backend>> OpenCpuBackend(const BackendOptions& options);
// cuda_backend.cc, in builds with CUDA.
absl::StatusOr<std::unique_ptr<Backend>> OpenCudaBackend(const BackendOptions& options);

}  // namespace tandem::engine
