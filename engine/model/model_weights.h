// A checkpoint's weights in the form the forward pass reads.
//
// All families of common/base/model_family.h name their tensors alike; which of them a layer has is
// the description's to say (ModelConfig). Names may lack the leading "model.", as in checkpoints
// saved without the language model's head.
//
// Memory: every matrix is copied once into the form that the device's products read (4 bytes per
// parameter in float32, 2 in bfloat16). Quantised ones (quantised_linear.h) keep their 4 bits where
// the device's products read them so (Ops::PackedInt4Bytes), and are dequantised elsewhere. What is
// rounded to 8 bits (fp8_weights.h) keeps its place in either type. Vectors become float32. The
// embedding table is read in place from the mapped checkpoint where the device shares the host's
// memory; with tied embeddings a packed copy of it serves as the output head, or the table itself
// where products read plain rows. The packed form may lie in memory that all workers of a host
// share (shared_weights.h). The checkpoint's pages are the kernel's to drop once they are packed. A
// device with memory of its own is given them by several threads (weight_stager.h), and makes dummy
// weights itself where it can (Ops::FillDummy).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

#include "common/base/model_config.h"
#include "engine/device/device.h"
#include "engine/kernels/ops.h"
#include "engine/model/checkpoint.h"
#include "engine/model/mapped_file.h"
#include "engine/model/padded_heads.h"
#include "engine/model/shard.h"

namespace tandem::engine {

// A float32 vector in memory of the device.
struct VectorWeights {
  Buffer memory;

  size_t size() const { return memory.size() / sizeof(float); }
  const float* data() const { return memory.as<const float>(); }  // null where the model has none
};

// A packed matrix in memory of the device, with its bias.
struct LinearWeights {
  PackedMatrix matrix;  // in `memory`
  VectorWeights bias;   // [n], or empty
  Buffer memory;
  Buffer order;  // matrix.order, or empty

  Projection projection() const { return {matrix, bias.data()}; }
};

struct LayerWeights {
  VectorWeights input_norm;           // [hidden]
  LinearWeights qkv;                  // [heads | kv_heads | kv_heads] * head_dim columns
  VectorWeights q_norm, k_norm;       // [head_dim] with qk_norm, else empty
  LinearWeights output;               // [hidden] columns
  VectorWeights post_attention_norm;  // [hidden]
  LinearWeights gate_up;              // [intermediate | intermediate] columns
  LinearWeights down;                 // [hidden] columns
};

struct ModelWeights {
  TensorView embedding;  // [vocab, hidden] in memory of the host: `checkpoint` or `dummy_embedding`
  Buffer embedding_copy;  // in memory of a device that does not share the host's
  std::vector<LayerWeights> layers;
  VectorWeights final_norm;  // [hidden]
  LinearWeights head;        // [vocab] columns; may lie in `embedding_copy`
  std::string digest;        // see common/base/model_digest.h
  std::unique_ptr<Checkpoint> checkpoint;
  Buffer dummy_embedding;

  // What the device reads: embedding.element [vocab][hidden].
  const void* embedding_data() const {
    return embedding_copy.size() > 0 ? embedding_copy.data() : embedding.data;
  }
  size_t PackedBytes() const;
};

struct LoadOptions {
  std::string model_dir;
  bool dummy = false;  // random weights from the config alone, the same for equal seeds
  uint64_t seed = 0;
  Element element = Element::kFloat32;  // of packed matrices: kFloat32 or kBFloat16
  int num_threads = 0;                  // of the host, to make up weights; 0: one per core
  // Path of memory to share with other workers (shared_weights.h); "": a copy of its own. Where it
  // cannot be had, or holds other weights, a warning says so, and the copy is this process's own.
  // Only for devices that share the host's memory.
  std::string shared_memory;
  bool report = false;  // how far it is, on stdout (load_progress.h)
  // Where it adds heads, the config counts them, and the checkpoint lacks them. Not with quantised
  // weights.
  HeadPadding padding = {};
  // The part that is loaded; the config is that of the part (ShardOf).
  Shard shard = {};
  // Rounds the matrices of layers to e4m3 (fp8_weights.h). Not with quantised weights.
  bool fp8 = false;
};

// Errors name every kind of mismatch by tensor: missing, extra, or of another shape than the config
// implies. Shows progress (load_progress.h). `ops` are made for options.element; the weights are
// read by ops of the same kind.
absl::StatusOr<ModelWeights> LoadModelWeights(const ModelConfig& config, const LoadOptions& options,
                                              Device* device, Ops* ops);

}  // namespace tandem::engine
