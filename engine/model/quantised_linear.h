// The weights of a linear layer that a checkpoint holds with 4 bits each
// (common/base/checkpoint_quantisation.h), and what they stand for:
//
//   weight[output][input] = scale[group][output] * (value[input][output] - zero[group][output])
//
// Tensors of a layer NAME, with G groups of inputs; eight values share an int32, the lowest bits
// first:
//   NAME.qweight  GPTQ: [inputs / 8][outputs], eight inputs of one output
//                 AWQ:  [inputs][outputs / 8], outputs 0, 2, 4, 6, 1, 3, 5, 7 of eight
//   NAME.qzeros   [G][outputs / 8], AWQ in the same order; GPTQ v1 has them less one
//   NAME.scales   [G][outputs], float16 or wider
//   NAME.g_idx    GPTQ: [inputs], the group of each; may be missing where groups are of neighbours
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

#include "common/base/checkpoint_quantisation.h"
#include "engine/model/checkpoint.h"

namespace tandem::engine {

// Reads its tensors where they lie in the checkpoint, which must outlive it. Constant.
class QuantisedLinear {
 public:
  // INVALID_ARGUMENT or NOT_FOUND names the tensor that is missing or does not fit.
  static absl::StatusOr<QuantisedLinear> Open(const Checkpoint& checkpoint, const std::string& name,
                                              const CheckpointQuantisation& quantisation,
                                              int64_t outputs, int64_t inputs);
  // The tensors that a layer may have.
  static std::vector<std::string> TensorNames(const std::string& name);

  size_t outputs() const { return outputs_; }
  size_t inputs() const { return inputs_; }
  // What it takes in the checkpoint.
  size_t Bytes() const;
  // Writes rows [first, first + rows) of the weight as float32 [rows][inputs]: exact, for a
  // float16 scale times a difference of 4-bit values fits.
  void Dequantise(size_t first, size_t rows, float* out) const;

  // For devices that read 4-bit weights as they are.
  size_t group_size() const { return group_size_; }
  // An order of the inputs in which those of a group are neighbours: the j-th is input order[j].
  // Empty where they are neighbours anyhow; nullopt where groups are not of equal size.
  std::optional<std::vector<int32_t>> Order() const;
  // Writes rows [first, first + rows) as Int4Rows has them, with the inputs in `order`.
  void PackRows(size_t first, size_t rows, const std::vector<int32_t>& order, uint32_t* values,
                uint32_t* scales) const;

 private:
  QuantisedLinear() = default;

  absl::Status ReadGroups(const Checkpoint& checkpoint, const std::string& name, size_t group_size,
                          size_t groups);
  void SettleZeros(const CheckpointQuantisation& quantisation);
  uint32_t Value(size_t output, size_t input) const;
  // As stored.
  uint32_t Zero(size_t group, size_t output) const;

  bool awq_ = false;
  uint32_t zero_offset_ = 0;  // of the true zero points over the stored ones
  size_t outputs_ = 0, inputs_ = 0, group_size_ = 0;
  IntTensorView values_, zeros_;
  TensorView scales_;
  std::vector<uint32_t> group_of_;  // [inputs]
};

}  // namespace tandem::engine
