// Reads a message from a call's bytes, so that text that is not UTF-8 gets an answer that names the
// field and the byte. (gRPC's own deserialisation answers such a request with a bare
// UNIMPLEMENTED.)
//
// Pure functions.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "google/protobuf/message.h"
#include "grpcpp/support/byte_buffer.h"

namespace tandem::router {

// INVALID_ARGUMENT: "text is not valid UTF-8 at byte 17", with the field, or that the bytes are no
// such message.
absl::Status ParseMessage(const grpc::ByteBuffer& buffer, google::protobuf::Message* out);

// Also for tests: `bytes` as one chunk.
absl::Status ParseMessageBytes(const std::string& bytes, google::protobuf::Message* out);

grpc::ByteBuffer SerializeMessage(const google::protobuf::Message& message);

}  // namespace tandem::router
