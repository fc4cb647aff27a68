// The forward pass of a decoder (ModelConfig) over a ragged batch and paged KV, written once over
// the ops of any device.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>

#include "absl/status/statusor.h"

#include "common/base/kv_layout.h"
#include "common/base/model_config.h"
#include "engine/device/collective.h"
#include "engine/device/device.h"
#include "engine/kernels/ops.h"
#include "engine/model/model_weights.h"

namespace tandem::engine {

struct DecoderLimits {
  int max_rows = 0;        // tokens of a step
  int max_items = 0;       // sequences of a step
  int max_logit_rows = 0;  // of one call of Logits
};

// What the ops of a model must be made for.
OpsShape OpsShapeOf(const ModelConfig& config, Element element, const DecoderLimits& limits);

struct ForwardInput {
  const RaggedBatch* batch = nullptr;  // in memory of the device
  const RaggedBatch* host = nullptr;   // the same in memory of the host
  const int32_t* drawn = nullptr;      // by the step before, see BeginArgs
  bool need_hidden = true;             // false: nobody will ask for logits, only KV is wanted
  // The rows that Logits will be asked for, all of them in one call, in memory of the device; null:
  // not known. Of the last layer no others are computed.
  const int32_t* wanted = nullptr;  // [num_wanted], at most DecoderLimits::max_logit_rows
  int num_wanted = 0;
  // [num_layers] or empty: recorded as soon as a layer's KV of the whole batch is written.
  std::span<const std::shared_ptr<Event>> layer_ready;
};

// Not thread-safe: one loop owns it. Its work is given to streams one step after the other.
class Decoder {
 public:
  // What Create allocates on the device besides the weights; `activation` is the ops'.
  static size_t WorkspaceBytes(const ModelConfig& config, Element activation,
                               const DecoderLimits& limits);
  // Allocates the workspace, once. `device` and `ops`, made for OpsShapeOf(config, ...), outlive
  // the decoder. `collective`, which outlives it too: where config and weights are a rank's part of
  // a model (shard.h); its device then waits in Forward for the other ranks.
  static absl::StatusOr<std::unique_ptr<Decoder>> Create(ModelConfig config, ModelWeights weights,
                                                         const DecoderLimits& limits,
                                                         Device* device, Ops* ops,
                                                         Collective* collective = nullptr);

  // Computes all rows, but for ForwardInput::wanted, and writes their KV into `kv`.
  void Forward(const ForwardInput& input, const KvRegion& kv, Stream* stream);
  // Logits of some rows of the last Forward (which had need_hidden): out is [count][vocab]. Both
  // pointers lead into memory of the device. Where that was told the wanted rows, of these.
  void Logits(const int32_t* row_ids, int count, float* out, Stream* stream);

  // Where there are ranks: Collective::Meet().
  void MeetRanks() {
    if (collective_ != nullptr) collective_->Meet();
  }

  // Layers of all passes that were given to a stream: where streams work at once, computed. May be
  // read by any thread.
  const std::atomic<uint64_t>& layers_done() const { return layers_done_; }

  const ModelConfig& config() const { return config_; }
  const ModelWeights& weights() const { return weights_; }

 private:
  Decoder(ModelConfig config, ModelWeights weights, Ops* ops, Collective* collective)
      : config_(std::move(config)),
        weights_(std::move(weights)),
        ops_(ops),
        collective_(collective) {}
  absl::Status Allocate(const DecoderLimits& limits, Device* device);
  // Rows of the residual stream, and what attention left for them.
  struct Rows {
    float* hidden = nullptr;
    const void* attended = nullptr;
    int count = 0;
  };
  void Attention(const ForwardInput& input, const KvPages& pages, Stream* stream);
  // The wanted rows of `all`, elsewhere.
  Rows Select(const ForwardInput& input, const Rows& all, Stream* stream);
  void FinishLayer(const LayerWeights& layer, const Norm& next_norm, const Rows& rows,
                   Stream* stream);
  // The op, and where there are ranks the sum over their parts.
  void AddProjection(const AddProjectionArgs& args, Stream* stream);
  Norm NormOf(const VectorWeights& weight) const;

  const ModelConfig config_;
  const ModelWeights weights_;
  Ops* const ops_;
  Collective* const collective_;  // null: the model is whole
  std::atomic<uint64_t> layers_done_ = 0;
  float rope_scale_ = 1;
  Buffer frequencies_;     // float [head_dim / 2]
  Buffer hidden_;          // float [max_rows][hidden]: the residual stream
  Buffer queries_;         // activation [max_rows][q_width + 2 * kv_width]
  Buffer attended_;        // activation [max_rows][q_width]
  Buffer inner_;           // activation [max_rows][intermediate]
  Buffer wanted_;          // float [max_logit_rows][hidden]
  bool selected_ = false;  // the last Forward's output is wanted_
};

}  // namespace tandem::engine
