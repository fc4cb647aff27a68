// A checkpoint's weights in the form the forward pass reads.
//
// All families of common/base/model_family.h name their tensors alike; which of them a layer has is
// the description's to say (ModelConfig). Names may lack the leading "model.", as in checkpoints
// saved without the language model's head.
//
// Memory: every matrix is copied once into packed form (4 bytes per parameter in float32, 2 in
// bfloat16); vectors become float32. The embedding table is read in place from the mapped
// checkpoint; with tied embeddings a packed copy of it serves as the output head. The checkpoint's
// pages are the kernel's to drop once they are packed.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

#include "common/base/model_config.h"
#include "engine/kernels/linear.h"
#include "engine/kernels/threads.h"
#include "engine/model/mapped_file.h"
#include "engine/model/safetensors.h"

namespace tandem::engine {

// A packed matrix and the memory it lies in.
struct LinearWeights {
  PackedMatrix matrix;
  std::vector<float> bias;  // [n], or empty
  MemoryBlock memory;
};

struct LayerWeights {
  std::vector<float> input_norm;           // [hidden]
  LinearWeights qkv;                       // [heads | kv_heads | kv_heads] * head_dim columns
  std::vector<float> q_norm, k_norm;       // [head_dim] with qk_norm, else empty
  LinearWeights output;                    // [hidden] columns
  std::vector<float> post_attention_norm;  // [hidden]
  LinearWeights gate_up;                   // [intermediate | intermediate] columns
  LinearWeights down;                      // [hidden] columns
};

struct ModelWeights {
  TensorView embedding;  // [vocab, hidden]; data in `checkpoint` or `dummy_embedding`
  std::vector<LayerWeights> layers;
  std::vector<float> final_norm;  // [hidden]
  LinearWeights head;             // [vocab] columns
  std::string digest;             // see model_digest.h
  std::unique_ptr<Checkpoint> checkpoint;
  MemoryBlock dummy_embedding;

  size_t PackedBytes() const;
};

struct LoadOptions {
  std::string model_dir;
  bool dummy = false;  // random weights from the config alone, the same for equal seeds
  uint64_t seed = 0;
  Element element = Element::kFloat32;  // of packed matrices: kFloat32 or kBFloat16
};

// Errors name every kind of mismatch by tensor: missing, extra, or of another shape than the config
// implies. Logs progress for large models.
absl::StatusOr<ModelWeights> LoadModelWeights(const ModelConfig& config, const LoadOptions& options,
                                              Threads* threads);

}  // namespace tandem::engine
