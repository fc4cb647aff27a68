// load_bench MODEL_DIR DEVICE [dummy]: how long the weights of a model take to its device's memory,
// with the digest by itself.
#include <cstdio>
#include <string>

#include "fmt/format.h"

#include "bench/usage.h"
#include "common/base/clock.h"
#include "common/base/locks.h"
#include "common/base/model_digest.h"
#include "common/base/status.h"
#include "engine/model/model_weights.h"
#include "engine/runtime/backend.h"
#include "engine/runtime/decoder_runner.h"

namespace tandem::engine {
namespace {

class Watch {
 public:
  double Seconds() const { return absl::ToDoubleSeconds(Clock::Real()->Now() - begin_); }

 private:
  const absl::Time begin_ = Clock::Real()->Now();
};

absl::Status Measure(const std::string& dir, const std::string& device, bool dummy) {
  const Watch opening;
  TANDEM_ASSIGN_OR_RETURN(const auto backend, OpenBackend(device, {}));
  TANDEM_ASSIGN_OR_RETURN(const ModelConfig config, ModelConfig::Load(dir));
  const Element element = backend->device().has_bfloat16() ? Element::kBFloat16 : Element::kFloat32;
  TANDEM_ASSIGN_OR_RETURN(const auto ops,
                          backend->MakeOps(OpsShapeOf(config, element, {256, 256, 256})));
  fmt::print("device and ops {:.2f} s\n", opening.Seconds());
  if (!dummy) {
    const Watch mapping;
    TANDEM_ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(dir));
    fmt::print("headers of {:.2f} GB {:.3f} s\n",
               static_cast<double>(checkpoint.TotalBytes()) / 1e9, mapping.Seconds());
    const Watch digesting;
    TANDEM_RETURN_IF_ERROR(CheckpointDigest(dir).status());
    fmt::print("digest {:.3f} s\n", digesting.Seconds());
  }
  const Watch loading;
  TANDEM_ASSIGN_OR_RETURN(
      const ModelWeights weights,
      LoadModelWeights(config, {dir, dummy, 0, element, 0}, &backend->device(), ops.get()));
  const double seconds = loading.Seconds();
  fmt::print("weights, {:.2f} GB on the device, {:.3f} s, {:.2f} GB/s\n",
             static_cast<double>(weights.PackedBytes()) / 1e9, seconds,
             static_cast<double>(weights.PackedBytes()) / 1e9 / seconds);
  return absl::OkStatus();
}

}  // namespace
}  // namespace tandem::engine

int main(int argc, char** argv) {
  tandem::WatchNoLockOrders();  // as the programs do
  if (tandem::AnswerHelp(argc, argv, "load_bench MODEL_DIR DEVICE [dummy]")) {
    return 0;
  }
  if (argc < 3) {
    fmt::print(stderr, "usage: load_bench MODEL_DIR DEVICE [dummy]\n");
    return 2;
  }
  const absl::Status status = tandem::engine::Measure(argv[1], argv[2], argc > 3);
  if (!status.ok()) fmt::print(stderr, "{}\n", status.ToString());
  return status.ok() ? 0 : 1;
}
