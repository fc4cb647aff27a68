#include <string>

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

// What workers tell each other so that KV can be converted between them, and so may differ: every
// other field must be equal, or one would compute what the other cannot use.
bool IsConvertible(const FieldDescriptor* field) { return field->name() == "tensor_parallel_size"; }

}  // namespace

// Over the descriptor, so that a field added to the message is compared too.
std::string DescribeDifference(const Capability& expected, const Capability& got) {
  std::vector<std::string> differences;
  const google::protobuf::Descriptor* descriptor = Capability::descriptor();
  for (int i = 0; i < descriptor->field_count(); ++i) {
    const FieldDescriptor* field = descriptor->field(i);
    if (IsConvertible(field)) continue;
    const std::string here = FieldText(expected, field);
    const std::string there = FieldText(got, field);
    if (here == there) continue;
    const char* hint =
        field->name() == "cluster_secret_digest" ? " (TANDEM_CLUSTER_SECRET must be the same)" : "";
    differences.push_back(fmt::format("{} {} here, {} there{}", field->name(), here, there, hint));
  }
  return absl::StrJoin(differences, "; ");
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

std::string ClusterSecretDigest(const std::string& secret) {
  return HashBytes("tandem cluster secret: " + secret).ToHex();
}

}  // namespace tandem
