#include "kvtransfer/transport/frame.h"

#include <bit>
#include <cstring>

#include "xxhash.h"

#include "common/base/status.h"

namespace tandem::kvtransfer {
namespace {

static_assert(std::endian::native == std::endian::little, "the wire is little-endian, unswapped");

constexpr uint32_t kMagic = 0x31564b54;  // "TKV1"
constexpr size_t kChecksumOffset = 72;

template <typename T>
void Put(EncodedHeader* out, size_t* offset, T value) {
  std::memcpy(out->data() + *offset, &value, sizeof(value));
  *offset += sizeof(value);
}

template <typename T>
T Take(std::span<const std::byte, kFrameHeaderBytes> bytes, size_t* offset) {
  T value;
  std::memcpy(&value, bytes.data() + *offset, sizeof(value));
  *offset += sizeof(value);
  return value;
}

}  // namespace

size_t MaxPayloadBytes(FrameType type) {
  switch (type) {
    case FrameType::kHello:
    case FrameType::kHelloOk:
    case FrameType::kRefuse:
    case FrameType::kQuiet:
    case FrameType::kResult:
    case FrameType::kAbort:
    case FrameType::kSelect:
    case FrameType::kSelected:
      return kMaxControlPayload;
    case FrameType::kProbe:
      return kMaxProbePayload;
    case FrameType::kOpen:
      return kKvTokenBytes;
    case FrameType::kOpened:
      return kMaxGrantBytes;
    case FrameType::kData:
      return kMaxDataPayload;
    case FrameType::kFinish:
      return kMaxDigestPayload;
    case FrameType::kChallenge:
    case FrameType::kProof:
    case FrameType::kProved:
      return kMaxProofPayload;
    case FrameType::kProbeAck:
      return sizeof(uint64_t);
  }
  return 0;
}

std::string_view FrameTypeName(FrameType type) {
  switch (type) {
    case FrameType::kHello:
      return "HELLO";
    case FrameType::kProbe:
      return "PROBE";
    case FrameType::kOpen:
      return "OPEN";
    case FrameType::kData:
      return "DATA";
    case FrameType::kFinish:
      return "FINISH";
    case FrameType::kQuiet:
      return "QUIET";
    case FrameType::kHelloOk:
      return "HELLO_OK";
    case FrameType::kRefuse:
      return "REFUSE";
    case FrameType::kProbeAck:
      return "PROBE_ACK";
    case FrameType::kResult:
      return "RESULT";
    case FrameType::kAbort:
      return "ABORT";
    case FrameType::kOpened:
      return "OPENED";
    case FrameType::kSelect:
      return "SELECT";
    case FrameType::kSelected:
      return "SELECTED";
    case FrameType::kChallenge:
      return "CHALLENGE";
    case FrameType::kProof:
      return "PROOF";
    case FrameType::kProved:
      return "PROVED";
  }
  return "";  // not a frame type
}

EncodedHeader EncodeHeader(const FrameHeader& header) {
  EncodedHeader out;
  size_t offset = 0;
  Put(&out, &offset, kMagic);
  Put(&out, &offset, static_cast<uint16_t>(kKvProtocolVersion));
  Put(&out, &offset, static_cast<uint16_t>(header.type));
  Put(&out, &offset, header.id.value.high);
  Put(&out, &offset, header.id.value.low);
  Put(&out, &offset, header.epoch);
  Put(&out, &offset, header.ordinal_begin);
  Put(&out, &offset, header.ordinal_count);
  Put(&out, &offset, header.layer_begin);
  Put(&out, &offset, header.layer_count);
  Put(&out, &offset, header.head_begin);
  Put(&out, &offset, header.head_count);
  Put(&out, &offset, header.payload_bytes);
  Put(&out, &offset, header.code);
  Put(&out, &offset, header.payload_digest);
  Put(&out, &offset, static_cast<uint64_t>(XXH3_64bits(out.data(), kChecksumOffset)));
  return out;
}

absl::StatusOr<FrameHeader> DecodeHeader(std::span<const std::byte, kFrameHeaderBytes> bytes) {
  size_t offset = 0;
  if (Take<uint32_t>(bytes, &offset) != kMagic) {
    return DataLoss("not a KV frame: wrong magic number");
  }
  const auto version = Take<uint16_t>(bytes, &offset);
  if (version != kKvProtocolVersion) {
    return FailedPrecondition("KV protocol version: here {}, peer {}", kKvProtocolVersion, version);
  }
  FrameHeader header;
  header.type = static_cast<FrameType>(Take<uint16_t>(bytes, &offset));
  header.id.value.high = Take<uint64_t>(bytes, &offset);
  header.id.value.low = Take<uint64_t>(bytes, &offset);
  header.epoch = Take<uint64_t>(bytes, &offset);
  header.ordinal_begin = Take<uint32_t>(bytes, &offset);
  header.ordinal_count = Take<uint32_t>(bytes, &offset);
  header.layer_begin = Take<uint32_t>(bytes, &offset);
  header.layer_count = Take<uint32_t>(bytes, &offset);
  header.head_begin = Take<uint32_t>(bytes, &offset);
  header.head_count = Take<uint32_t>(bytes, &offset);
  header.payload_bytes = Take<uint32_t>(bytes, &offset);
  header.code = Take<uint32_t>(bytes, &offset);
  header.payload_digest = Take<uint64_t>(bytes, &offset);
  if (Take<uint64_t>(bytes, &offset) != XXH3_64bits(bytes.data(), kChecksumOffset)) {
    return DataLoss("KV frame header fails its checksum");
  }
  if (FrameTypeName(header.type).empty()) {
    return InvalidArgument("unknown KV frame type {}", static_cast<int>(header.type));
  }
  if (header.payload_bytes > MaxPayloadBytes(header.type)) {
    return InvalidArgument("{} frame of {} bytes, more than {}", FrameTypeName(header.type),
                           header.payload_bytes, MaxPayloadBytes(header.type));
  }
  if (header.ordinal_begin > kMaxOrdinals || header.ordinal_count > kMaxOrdinals ||
      header.layer_begin > kMaxLayers || header.layer_count > kMaxLayers ||
      header.head_begin > kMaxHeads || header.head_count > kMaxHeads) {
    return InvalidArgument(
        "{} frame: ordinals [{}, +{}), layers [{}, +{}) or heads [{}, +{}) out of range",
        FrameTypeName(header.type), header.ordinal_begin, header.ordinal_count, header.layer_begin,
        header.layer_count, header.head_begin, header.head_count);
  }
  if (header.code > static_cast<uint32_t>(absl::StatusCode::kUnauthenticated)) {
    return InvalidArgument("{} frame: unknown status code {}", FrameTypeName(header.type),
                           header.code);
  }
  return header;
}

uint64_t PayloadDigest(std::span<const std::byte> payload) {
  return XXH3_64bits(payload.data(), payload.size());
}

}  // namespace tandem::kvtransfer
