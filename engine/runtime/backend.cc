#include "engine/runtime/backend.h"

#include "spdlog/spdlog.h"

#include "common/base/status.h"

namespace tandem::engine {

const std::vector<BackendEntry>& Backends() {
  static const std::vector<BackendEntry> backends = {
#if TANDEM_CUDA
    {"cuda", OpenCudaBackend},
#endif
    {"cpu", OpenCpuBackend}
  };
  return backends;
}

absl::StatusOr<std::unique_ptr<Backend>> OpenBackend(const std::string& name,
                                                     const BackendOptions& options) {
  std::string names;
  absl::Status why;  // auto: the last one's
  for (const BackendEntry& entry : Backends()) {
    names += (names.empty() ? "" : ", ") + entry.name;
    if (name != "auto" && name != entry.name) continue;
    absl::StatusOr<std::unique_ptr<Backend>> backend = entry.open(options);
    if (backend.ok()) return backend;
    why = backend.status();
    // What is wrong with the flags is not for another device to make good.
    if (name != "auto" || absl::IsInvalidArgument(why)) {
      return absl::Status(why.code(), fmt::format("--device={}: {}", entry.name, MessageOf(why)));
    }
    spdlog::info("--device=auto does not take {}: {}", entry.name, MessageOf(why));
  }
  if (name == "auto") return why;
  if (name == "cuda")
    return InvalidArgument("--device=cuda: this build has no CUDA; it has {}", names);
  return InvalidArgument("--device must be auto or one of {}, got \"{}\"", names, name);
}

}  // namespace tandem::engine
