#include "router/api/message_wire.h"

#include <map>
#include <optional>
#include <vector>

#include "google/protobuf/descriptor.h"
#include "google/protobuf/unknown_field_set.h"
#include "grpcpp/support/slice.h"

#include "common/base/status.h"
#include "common/rpc/status.h"
#include "common/text/utf8.h"

namespace tandem::router {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;
using google::protobuf::UnknownField;
using google::protobuf::UnknownFieldSet;

constexpr int kMaxDepth = 32;

struct BadText {
  std::string field;  // proto path
  size_t byte = 0;
};

// Looks along the schema for the first string field that is not UTF-8. Protobuf refuses such a
// message without saying where; read as a message of unknown fields, for which strings are bytes,
// it shows all that it holds.
std::optional<BadText> FindBadText(const Descriptor* type, const std::string& bytes,
                                   const std::string& prefix, int depth) {
  UnknownFieldSet values;
  if (depth > kMaxDepth || !values.ParseFromString(bytes)) return std::nullopt;
  std::map<int, int> seen;  // entries of repeated fields
  for (int i = 0; i < values.field_count(); ++i) {
    const UnknownField& value = values.field(i);
    const FieldDescriptor* field = type->FindFieldByNumber(value.number());
    if (field == nullptr || value.type() != UnknownField::TYPE_LENGTH_DELIMITED) continue;
    std::string path = prefix + field->name();
    if (field->is_repeated()) path += fmt::format("[{}]", seen[field->number()]++);
    if (field->type() == FieldDescriptor::TYPE_MESSAGE) {
      if (auto bad =
              FindBadText(field->message_type(), value.length_delimited(), path + ".", depth + 1)) {
        return bad;
      }
    } else if (field->type() == FieldDescriptor::TYPE_STRING) {
      if (const auto byte = FindInvalidUtf8(value.length_delimited())) return BadText{path, *byte};
    }
  }
  return std::nullopt;
}

}  // namespace

absl::Status ParseMessageBytes(const std::string& bytes, google::protobuf::Message* out) {
  if (out->ParseFromString(bytes)) return absl::OkStatus();
  if (const auto bad = FindBadText(out->GetDescriptor(), bytes, "", 0)) {
    return BadField(bad->field, "is not valid UTF-8 at byte {}", bad->byte);
  }
  return InvalidArgument("the request is not a valid {} message",
                         out->GetDescriptor()->full_name());
}

absl::Status ParseMessage(const grpc::ByteBuffer& buffer, google::protobuf::Message* out) {
  std::vector<grpc::Slice> slices;
  if (!buffer.Dump(&slices).ok()) return InvalidArgument("the request's bytes cannot be read");
  std::string bytes;
  bytes.reserve(buffer.Length());
  for (const grpc::Slice& slice : slices) {
    bytes.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
  }
  return ParseMessageBytes(bytes, out);
}

grpc::ByteBuffer SerializeMessage(const google::protobuf::Message& message) {
  grpc::Slice slice(message.SerializeAsString());
  return grpc::ByteBuffer(&slice, 1);
}

}  // namespace tandem::router
