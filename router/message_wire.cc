#include "router/message_wire.h"

#include <map>
#include <optional>
#include <vector>

#include "google/protobuf/descriptor.h"
#include "google/protobuf/io/coded_stream.h"
#include "google/protobuf/wire_format_lite.h"
#include "grpcpp/support/slice.h"

#include "common/base/status.h"
#include "common/rpc/status.h"
#include "common/text/utf8.h"

namespace tandem::router {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;
using google::protobuf::internal::WireFormatLite;
using google::protobuf::io::CodedInputStream;

constexpr int kMaxDepth = 32;

struct BadText {
  std::string field;  // proto path
  size_t byte = 0;
};

// Walks the wire format along the schema for the first string field that is not UTF-8.
std::optional<BadText> FindBadText(const Descriptor* type, const std::string& bytes,
                                   const std::string& prefix, int depth) {
  if (depth > kMaxDepth) return std::nullopt;
  CodedInputStream in(reinterpret_cast<const uint8_t*>(bytes.data()),
                      static_cast<int>(bytes.size()));
  std::map<int, int> seen;  // entries of repeated fields
  while (const uint32_t tag = in.ReadTag()) {
    const FieldDescriptor* field = type->FindFieldByNumber(WireFormatLite::GetTagFieldNumber(tag));
    const bool nested =
        WireFormatLite::GetTagWireType(tag) == WireFormatLite::WIRETYPE_LENGTH_DELIMITED &&
        field != nullptr &&
        (field->type() == FieldDescriptor::TYPE_STRING ||
         field->type() == FieldDescriptor::TYPE_MESSAGE);
    if (!nested) {
      if (!WireFormatLite::SkipField(&in, tag)) return std::nullopt;
      continue;
    }
    uint32_t size = 0;
    std::string value;
    if (!in.ReadVarint32(&size) || !in.ReadString(&value, static_cast<int>(size))) {
      return std::nullopt;
    }
    std::string path = prefix + field->name();
    if (field->is_repeated()) path += fmt::format("[{}]", seen[field->number()]++);
    if (field->type() == FieldDescriptor::TYPE_MESSAGE) {
      if (auto bad = FindBadText(field->message_type(), value, path + ".", depth + 1)) return bad;
    } else if (const std::optional<size_t> byte = FindInvalidUtf8(value)) {
      return BadText{path, *byte};
    }
  }
  return std::nullopt;
}

}  // namespace

absl::Status ReadMessageBytes(const std::string& bytes, google::protobuf::Message* out) {
  if (out->ParseFromString(bytes)) return absl::OkStatus();
  if (const auto bad = FindBadText(out->GetDescriptor(), bytes, "", 0)) {
    return WithField(InvalidArgument("{} is not valid UTF-8 at byte {}", bad->field, bad->byte),
                     bad->field);
  }
  return InvalidArgument("the request is not a valid {} message",
                         out->GetDescriptor()->full_name());
}

absl::Status ReadMessage(const grpc::ByteBuffer& buffer, google::protobuf::Message* out) {
  std::vector<grpc::Slice> slices;
  if (!buffer.Dump(&slices).ok()) return InvalidArgument("the request's bytes cannot be read");
  std::string bytes;
  bytes.reserve(buffer.Length());
  for (const grpc::Slice& slice : slices) {
    bytes.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
  }
  return ReadMessageBytes(bytes, out);
}

grpc::ByteBuffer WriteMessage(const google::protobuf::Message& message) {
  grpc::Slice slice(message.SerializeAsString());
  return grpc::ByteBuffer(&slice, 1);
}

}  // namespace tandem::router
