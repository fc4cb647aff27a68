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

// What makes KV of the cluster's type of it: that of the weights follows --dtype.
std::string KvDTypeRemedy(const Capability& cluster, const Capability& worker) {
  constexpr std::string_view kFp8 = "fp8";
  if (cluster.kv_dtype() == kFp8) return "--kv-cache-dtype=fp8";
  if (worker.kv_dtype() == kFp8) return "--kv-cache-dtype=auto";
  return fmt::format("--dtype={}", Shown(cluster.kv_dtype()));
}

// What the checkpoint has goes by its digest.
std::string QuantizationRemedy(const Capability& cluster) {
  const std::string& quantization = cluster.quantization();
  return fmt::format("--quantization={}", quantization.empty() ? "auto" : Shown(quantization));
}

// The flag that says the field, where there is one whose value is the field's own.
std::string_view FlagOf(const FieldDescriptor* field) {
  static constexpr std::pair<std::string_view, std::string_view> kFlags[] = {
      {"model", "--served-model-name"},
      {"dtype", "--dtype"},
      {"block_size", "--block-size"},
  };
  for (const auto& [name, flag] : kFlags) {
    if (field->name() == name) return flag;
  }
  return "";
}

// Where the field comes from otherwise.
std::string_view SourceOf(const FieldDescriptor* field) {
  static constexpr std::pair<std::string_view, std::string_view> kSources[] = {
      {"model_digest", "the checkpoint in --model, --load-format and --seed"},
      {"tokenizer_digest", "tokenizer.json in --model"},
      {"protocol_version", "the release of Tandem"},
      {"layout", "the release of Tandem"},
  };
  for (const auto& [name, source] : kSources) {
    if (field->name() == name) return source;
  }
  return "config.json in --model";
}

void AddOnce(std::string text, std::vector<std::string>* texts) {
  if (std::find(texts->begin(), texts->end(), text) == texts->end()) {
    texts->push_back(std::move(text));
  }
}

}  // namespace

std::string DescribeDifference(const Capability& cluster, const Capability& worker) {
  std::vector<std::string> differences;
  for (const FieldDescriptor* field : DifferingFields(cluster, worker)) {
    differences.push_back(absl::EndsWith(field->name(), "_digest")
                              ? fmt::format("{} differs", field->name())
                              : fmt::format("{}: this worker {}, cluster {}", field->name(),
                                            Shown(FieldText(worker, field)),
                                            Shown(FieldText(cluster, field))));
  }
  return absl::StrJoin(differences, "; ");
}

std::string DifferenceRemedy(const Capability& cluster, const Capability& worker) {
  std::vector<std::string> flags, sources;
  for (const FieldDescriptor* field : DifferingFields(cluster, worker)) {
    if (field->name() == "kv_dtype") {
      AddOnce(KvDTypeRemedy(cluster, worker), &flags);
    } else if (field->name() == "quantization") {
      AddOnce(QuantizationRemedy(cluster), &flags);
    } else if (const std::string_view flag = FlagOf(field); !flag.empty()) {
      AddOnce(fmt::format("{}={}", flag, Shown(FieldText(cluster, field))), &flags);
    } else {
      AddOnce(std::string(SourceOf(field)), &sources);
    }
  }
  std::vector<std::string> with;
  if (!flags.empty()) with.push_back(absl::StrJoin(flags, " "));
  if (!sources.empty()) with.push_back("the same: " + absl::StrJoin(sources, "; "));
  return with.empty() ? "" : "start it with " + absl::StrJoin(with, ", and with ");
}

std::string CapabilityDigest(const Capability& capability) {
  std::string text;
  const google::protobuf::Descriptor* descriptor = Capability::descriptor();
  for (int i = 0; i < descriptor->field_count(); ++i) {
    const FieldDescriptor* field = descriptor->field(i);
    if (IsConvertible(field)) continue;
    // A build that does not know the field has the digest of one that leaves it empty.
    if (field->name() == "quantization" && capability.quantization().empty()) continue;
    const std::string value = FieldText(capability, field);
    text += fmt::format("{}={}:{};", field->name(), value.size(), value);
  }
  return HashBytes(text).ToHex();
}

std::string TokenizerDigest(const std::string& model_dir) {
  absl::StatusOr<std::string> bytes = ReadFile(model_dir + "/tokenizer.json");
  return bytes.ok() ? HashBytes(*bytes).ToHex() : "";
}

}  // namespace tandem
