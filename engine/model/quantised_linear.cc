#include "engine/model/quantised_linear.h"

#include <algorithm>
#include <array>
#include <numeric>
#include <utility>

#include "common/base/safetensors.h"
#include "common/base/status.h"
#include "engine/kernels/int4_rows.h"

namespace tandem::engine {
namespace {

constexpr size_t kPerWord = 8;
constexpr uint32_t kMask = 15;
// Where AWQ has the values of eight neighbours in a word.
constexpr std::array<uint32_t, kPerWord> kAwqPlace = {0, 4, 1, 5, 2, 6, 3, 7};
// A symmetric layer's zero point.
constexpr uint32_t kMiddle = 8;

uint32_t Nibble(uint32_t word, size_t place) { return word >> (4 * place) & kMask; }

absl::Status CheckShape(const std::string& name, const std::vector<int64_t>& shape,
                        const std::vector<size_t>& expected) {
  const std::vector<int64_t> wanted(expected.begin(), expected.end());
  if (shape == wanted) return absl::OkStatus();
  return InvalidArgument("tensor \"{}\" has shape {}, config.json and its quantisation imply {}",
                         name, ShapeText(shape), ShapeText(wanted));
}

}  // namespace

absl::StatusOr<QuantisedLinear> QuantisedLinear::Open(const Checkpoint& checkpoint,
                                                      const std::string& name,
                                                      const CheckpointQuantisation& quantisation,
                                                      int64_t outputs, int64_t inputs) {
  QuantisedLinear out;
  out.awq_ = quantisation.method == CheckpointQuantisation::Method::kAwq;
  out.outputs_ = static_cast<size_t>(outputs);
  out.inputs_ = static_cast<size_t>(inputs);
  if (out.outputs_ % kPerWord != 0 || (!out.awq_ && out.inputs_ % kPerWord != 0)) {
    return InvalidArgument("\"{}\" has {} inputs and {} outputs, which are not packed by eight",
                           name, inputs, outputs);
  }
  const size_t group_size =
      quantisation.group_size < 0 ? out.inputs_ : static_cast<size_t>(quantisation.group_size);
  out.group_size_ = std::min(group_size, out.inputs_);
  const size_t groups = (out.inputs_ + group_size - 1) / group_size;
  const size_t words = out.outputs_ / kPerWord;
  TANDEM_ASSIGN_OR_RETURN(out.values_, checkpoint.GetInts(name + ".qweight"));
  TANDEM_RETURN_IF_ERROR(
      CheckShape(name + ".qweight", out.values_.shape,
                 out.awq_ ? std::vector<size_t>{out.inputs_, words}
                          : std::vector<size_t>{out.inputs_ / kPerWord, out.outputs_}));
  TANDEM_ASSIGN_OR_RETURN(out.zeros_, checkpoint.GetInts(name + ".qzeros"));
  TANDEM_RETURN_IF_ERROR(CheckShape(name + ".qzeros", out.zeros_.shape, {groups, words}));
  TANDEM_ASSIGN_OR_RETURN(out.scales_, checkpoint.Get(name + ".scales"));
  TANDEM_RETURN_IF_ERROR(CheckShape(name + ".scales", out.scales_.shape, {groups, out.outputs_}));
  TANDEM_RETURN_IF_ERROR(out.ReadGroups(checkpoint, name + ".g_idx", group_size, groups));
  out.SettleZeros(quantisation);
  return out;
}

std::vector<std::string> QuantisedLinear::TensorNames(const std::string& name) {
  return {name + ".qweight", name + ".qzeros", name + ".scales", name + ".g_idx"};
}

absl::Status QuantisedLinear::ReadGroups(const Checkpoint& checkpoint, const std::string& name,
                                         size_t group_size, size_t groups) {
  group_of_.resize(inputs_);
  if (awq_ || !checkpoint.Has(name)) {
    for (size_t k = 0; k < inputs_; ++k) group_of_[k] = static_cast<uint32_t>(k / group_size);
    return absl::OkStatus();
  }
  TANDEM_ASSIGN_OR_RETURN(const IntTensorView stored, checkpoint.GetInts(name));
  TANDEM_RETURN_IF_ERROR(CheckShape(name, stored.shape, {inputs_}));
  for (size_t k = 0; k < inputs_; ++k) {
    group_of_[k] = stored.at(k);
    if (group_of_[k] >= groups) {
      return InvalidArgument("tensor \"{}\": group {} of input {} is not below {}", name,
                             static_cast<int32_t>(group_of_[k]), k, groups);
    }
  }
  return absl::OkStatus();
}

// What a symmetric checkpoint says of its format is not to be trusted: tools have written either
// under either name. Its zero points tell, as they are all the same.
void QuantisedLinear::SettleZeros(const CheckpointQuantisation& quantisation) {
  zero_offset_ = !awq_ && quantisation.zeros_less_one ? 1 : 0;
  if (awq_ || !quantisation.symmetric) return;
  const size_t words = zeros_.shape[0] * outputs_ / kPerWord;
  for (const uint32_t offset : {0u, 1u}) {
    const uint32_t expected = (kMiddle - offset) * 0x11111111u;
    bool all = true;
    for (size_t i = 0; i < words && all; ++i) all = zeros_.at(i) == expected;
    if (all) zero_offset_ = offset;
  }
}

size_t QuantisedLinear::Bytes() const {
  const size_t words =
      inputs_ * outputs_ / kPerWord + static_cast<size_t>(zeros_.shape[0] * zeros_.shape[1]);
  return words * sizeof(uint32_t) + scales_.bytes + (awq_ ? 0 : inputs_ * sizeof(uint32_t));
}

uint32_t QuantisedLinear::Value(size_t output, size_t input) const {
  if (awq_) {
    return Nibble(values_.at((input * outputs_ + output) / kPerWord), kAwqPlace[output % kPerWord]);
  }
  return Nibble(values_.at(input / kPerWord * outputs_ + output), input % kPerWord);
}

uint32_t QuantisedLinear::Zero(size_t group, size_t output) const {
  const size_t place = awq_ ? kAwqPlace[output % kPerWord] : output % kPerWord;
  return Nibble(zeros_.at((group * outputs_ + output) / kPerWord), place);
}

void QuantisedLinear::Dequantise(size_t first, size_t rows, float* out) const {
  const auto groups = static_cast<size_t>(zeros_.shape[0]);
  std::vector<float> scales(groups), zeros(groups);
  for (size_t row = 0; row < rows; ++row, out += inputs_) {
    const size_t output = first + row;
    for (size_t g = 0; g < groups; ++g) {
      scales[g] = LoadElement(scales_.data, scales_.element, g * outputs_ + output);
      // Four bits again: 0 less one is stored as 15.
      zeros[g] = static_cast<float>((Zero(g, output) + zero_offset_) & kMask);
    }
    for (size_t k = 0; k < inputs_; ++k) {
      const uint32_t group = group_of_[k];
      out[k] = scales[group] * (static_cast<float>(Value(output, k)) - zeros[group]);
    }
  }
}

std::optional<std::vector<int32_t>> QuantisedLinear::Order() const {
  std::vector<int32_t> order(inputs_);
  std::iota(order.begin(), order.end(), 0);
  const auto group = [&](int32_t input) { return group_of_[static_cast<size_t>(input)]; };
  if (std::is_sorted(group_of_.begin(), group_of_.end())) {
    for (size_t j = 0; j < inputs_; ++j) {
      if (group_of_[j] != j / group_size_) return std::nullopt;
    }
    return std::vector<int32_t>();
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return group(a) < group(b); });
  for (size_t j = 0; j < inputs_; ++j) {
    if (group(order[j]) != j / group_size_) return std::nullopt;
  }
  return order;
}

void QuantisedLinear::PackRows(size_t first, size_t rows, const std::vector<int32_t>& order,
                               uint32_t* values, uint32_t* scales) const {
  const size_t words = (inputs_ + kPerWord - 1) / kPerWord;
  const auto groups = static_cast<size_t>(zeros_.shape[0]);
  // Words outside, rows inside: neighbouring outputs are neighbours in the checkpoint.
  for (size_t word = 0; word < words; ++word) {
    const size_t k = word * kPerWord, count = std::min(kPerWord, inputs_ - k);
    for (size_t row = 0; row < rows; ++row) {
      uint32_t* out = values + row * words + word;
      if (!awq_ && order.empty()) {
        *out = values_.at(word * outputs_ + first + row);
        continue;
      }
      *out = 0;
      for (size_t i = 0; i < count; ++i) {
        const size_t input = order.empty() ? k + i : static_cast<size_t>(order[k + i]);
        *out |= Value(first + row, input) << (4 * i);
      }
    }
  }
  for (size_t group = 0; group < groups; ++group) {
    for (size_t row = 0; row < rows; ++row) {
      const size_t output = first + row;
      scales[row * groups + group] =
          ScaleWord(LoadElement(scales_.data, scales_.element, group * outputs_ + output),
                    (Zero(group, output) + zero_offset_) & kMask);
    }
  }
}

}  // namespace tandem::engine
