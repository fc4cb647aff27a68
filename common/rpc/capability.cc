#include <algorithm>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_join.h"
#include "fmt/format.h"
#include "google/protobuf/descriptor.h"

#include "common/base/block_hash.h"
#include "common/base/file.h"
#include "common/rpc/cluster_client.h"

namespace tandem {
namespace {

using google::protobuf::FieldDescriptor;
using internal::v1::Capability;

std::string FieldText(const Capability& capability, const FieldDescriptor* field) {
  const google::protobuf::Reflection* reflection = capability.GetReflection();
  if (field->cpp_type() == FieldDescriptor::CPPTYPE_STRING) {
    const std::string text = reflection->GetString(capability, field);
    return text.empty() ? "(none)" : text;
  }
  return std::to_string(reflection->GetUInt32(capability, field));
}

// As it may stand in a log.
std::string Shown(const std::string& text) {
  constexpr size_t kMost = 64;
  return absl::CEscape(text.substr(0, kMost)) + (text.size() > kMost ? "..." : "");
}

// What workers tell each other so that KV can be converted between them, and so may differ: every
// other field must be equal, or one would compute what the other cannot use.
bool IsConvertible(const FieldDescriptor* field) { return field->name() == "tensor_parallel_size"; }

// Over the descriptor, so that a field added to the message is compared too.
std::vector<const FieldDescriptor*> DifferingFields(const Capability& a, const Capability& b) {
  std::vector<const FieldDescriptor*> fields;
  const google::protobuf::Descriptor* descriptor = Capability::descriptor();
  for (int i = 0; i < descriptor->field_count(); ++i) {
    const FieldDescriptor* field = descriptor->field(i);
    if (!IsConvertible(field) && FieldText(a, field) != FieldText(b, field)) {
      fields.push_back(field);
    }
  }
  return fields;
}

// Where an operator says what the field is.
std::string SourceOf(const FieldDescriptor* field) {
  static constexpr std::pair<std::string_view, std::string_view> kSources[] = {
      {"model", "--served-model-name"},
      {"model_digest", "the checkpoint in --model, --load-format, --seed"},
      {"dtype", "--dtype (a CPU without bfloat16 computes in float32)"},
      {"kv_dtype", "--dtype (a CPU without bfloat16 computes in float32)"},
      {"block_size", "--block-size"},
      {"tokenizer_digest", "tokenizer.json in --model"},
      {"protocol_version", "the release of Tandem"},
      {"layout", "the release of Tandem"},
  };
  for (const auto& [name, source] : kSources) {
    if (field->name() == name) return std::string(source);
  }
  return "config.json in --model";
}

}  // namespace

std::string DescribeDifference(const Capability& expected, const Capability& got) {
  std::vector<std::string> differences;
  for (const FieldDescriptor* field : DifferingFields(expected, got)) {
    differences.push_back(absl::EndsWith(field->name(), "_digest")
                              ? fmt::format("{} differs", field->name())
                              : fmt::format("{} {} here, {} there", field->name(),
                                            Shown(FieldText(expected, field)),
                                            Shown(FieldText(got, field))));
  }
  return absl::StrJoin(differences, "; ");
}

std::string DifferenceRemedy(const Capability& expected, const Capability& got) {
  std::vector<std::string> sources;
  for (const FieldDescriptor* field : DifferingFields(expected, got)) {
    std::string source = SourceOf(field);
    if (std::find(sources.begin(), sources.end(), source) == sources.end()) {
      sources.push_back(std::move(source));
    }
  }
  return absl::StrJoin(sources, ", ");
}

std::string CapabilityDigest(const Capability& capability) {
  std::string text;
  const google::protobuf::Descriptor* descriptor = Capability::descriptor();
  for (int i = 0; i < descriptor->field_count(); ++i) {
    if (IsConvertible(descriptor->field(i))) continue;
    const std::string value = FieldText(capability, descriptor->field(i));
    text += fmt::format("{}={}:{};", descriptor->field(i)->name(), value.size(), value);
  }
  return HashBytes(text).ToHex();
}

std::string TokenizerDigest(const std::string& model_dir) {
  absl::StatusOr<std::string> bytes = ReadFile(model_dir + "/tokenizer.json");
  return bytes.ok() ? HashBytes(*bytes).ToHex() : "";
}

}  // namespace tandem
