// The ops on the CPU, composed of the kernels of this folder.
//
// float32: a row's results are bit-identical in every batch and with any number of threads. Matrix
// products round their inputs to bfloat16 where the weights are bfloat16; all else is float32.
#pragma once

#include <memory>
#include <vector>

#include "engine/device/buffer.h"
#include "engine/device/cpu/threads.h"
#include "engine/kernels/cpu/attention.h"
#include "engine/kernels/cpu/sample.h"
#include "engine/kernels/ops.h"

namespace tandem::engine {

class CpuOps final : public Ops {
 public:
  // `scratch`: ScratchBytes(shape) bytes. `threads` outlives the ops.
  static size_t ScratchBytes(const OpsShape& shape);
  CpuOps(const OpsShape& shape, Buffer scratch, Threads* threads);

  Element activation() const override { return Element::kFloat32; }
  size_t PackedWeightBytes(size_t n, size_t k) const override;
  void PackWeightRows(const void* source, Element source_element, size_t rows, size_t k,
                      size_t first_column, void* packed, Stream* stream) override;

  void Begin(const BeginArgs& args, Stream* stream) override;
  void Qkv(const QkvArgs& args, Stream* stream) override;
  void Attention(const AttentionArgs& args, Stream* stream) override;
  void SelectRows(const SelectRowsArgs& args, Stream* stream) override;
  void AddProjection(const AddProjectionArgs& args, Stream* stream) override;
  void GateUp(const GateUpArgs& args, Stream* stream) override;
  void Logits(const LogitsArgs& args, Stream* stream) override;
  void Sample(const SampleArgs& args, Stream* stream) override;

 private:
  // Floats of each part of the scratch memory.
  struct Parts {
    size_t normed, gate_up, cos, sin, linear;
  };
  static Parts PartsOf(const OpsShape& shape);
  void Project(const Projection& projection, const float* x, size_t rows, float* y);

  const OpsShape shape_;
  Threads* const threads_;
  const Buffer scratch_;      // holds what the pointers below point to
  const size_t mlp_tile_;     // rows of the feed-forward block computed together
  float* normed_ = nullptr;   // [max(max_rows, max_logit_rows)][hidden]
  float* gate_up_ = nullptr;  // [mlp_tile][2 * inner]
  float* cos_ = nullptr;      // [max_rows][head_dim / 2], of the step
  float* sin_ = nullptr;
  void* linear_scratch_ = nullptr;
  std::vector<int32_t> token_ids_;         // of the step, none pending
  std::vector<AttentionItem> items_;       // of the step
  std::vector<DrawScratch> draw_scratch_;  // [threads]
};

}  // namespace tandem::engine
