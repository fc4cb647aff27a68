// The one frame format of every KV connection: a fixed header of kFrameHeaderBytes, then at most
// MaxPayloadBytes(type) bytes of payload. docs/kv_transfer.md has the table of frames. Only of DATA
// it depends on the transport whether the payload follows its header or travels beside it.
//
// Encoding and decoding are pure; everything a header claims is bounded here, before anybody
// allocates or writes. What depends on a transfer (ordinals, layers, payload length against the
// layout) the receiver checks against what it expects.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "absl/status/statusor.h"

#include "common/base/transfer_id.h"

namespace tandem::kvtransfer {

inline constexpr uint32_t kKvProtocolVersion = 4;
inline constexpr size_t kFrameHeaderBytes = 80;
inline constexpr size_t kMaxControlPayload = 4096;             // hello, messages
inline constexpr size_t kMaxProbePayload = size_t{16} << 20;   // one probe frame
inline constexpr size_t kMaxDataPayload = size_t{64} << 20;    // one data frame
inline constexpr size_t kMaxDigestPayload = size_t{32} << 20;  // 8 bytes per block
inline constexpr size_t kKvTokenBytes = 32;
inline constexpr uint32_t kMaxOrdinals = 1u << 22;  // blocks of one transfer
inline constexpr uint32_t kMaxLayers = 1u << 16;
inline constexpr uint32_t kMaxHeads = 1u << 16;
inline constexpr size_t kMaxGrantBytes = 64;
inline constexpr size_t kMaxProofPayload = 256;  // a worker id, a nonce, a proof

enum class FrameType : uint16_t {
  // From the sender of KV.
  kHello = 1,   // payload: EncodeHello
  kProbe = 2,   // link self-test: ordinal_begin = its number; code 1: its digest is wanted
  kOpen = 4,    // begins a transfer; ordinal_count = number of blocks, payload: token
  kData = 5,    // heads [head_begin, +head_count) of blocks [ordinal_begin, +ordinal_count) of
                // layers [layer_begin, +layer_count)
  kFinish = 6,  // all layers of these heads were sent; payload: one digest (8 bytes) per block
  kQuiet = 7,   // nothing more comes for this transfer; code and message say why
  kSelect = 8,  // payload: name of the offered transport that the sender wants to use,
                // and after a space what that one has to say
  kProof = 9,   // answer to kChallenge (channel/link_proof.h)
  // From the receiver of KV.
  kHelloOk = 16,    // payload: EncodeHello
  kRefuse = 17,     // the connection is refused; payload: one line that says why
  kProbeAck = 18,   // answer to kProbe, with its number; payload: its digest, or 0 (8 bytes)
  kResult = 19,     // end of a finished transfer; code 0: sealed
  kAbort = 20,      // the receiver no longer wants this transfer; answer with kQuiet
  kOpened = 21,     // answer to kOpen over a one-sided transport; payload: the grant to write
  kSelected = 22,   // answer to kSelect; code 0: it is in use from here on
  kChallenge = 23,  // the first frame of all (channel/link_proof.h)
  kProved = 24,     // answer to kProof
};

struct FrameHeader {
  FrameType type = FrameType::kHello;
  TransferId id;
  uint64_t epoch = 0;
  uint32_t ordinal_begin = 0;
  uint32_t ordinal_count = 0;
  uint32_t layer_begin = 0;
  uint32_t layer_count = 0;
  uint32_t head_begin = 0;  // heads of the model
  uint32_t head_count = 0;
  uint32_t payload_bytes = 0;
  uint32_t code = 0;  // absl::StatusCode of kQuiet, kResult, kAbort, kRefuse, kSelected
  // XXH3-64 of the payload; of kData and kProbe where the bytes lie, if the transport says so,
  // else 0.
  uint64_t payload_digest = 0;

  bool operator==(const FrameHeader&) const = default;
};

using EncodedHeader = std::array<std::byte, kFrameHeaderBytes>;

// The most payload that a frame of this type may carry.
size_t MaxPayloadBytes(FrameType type);
std::string_view FrameTypeName(FrameType type);

EncodedHeader EncodeHeader(const FrameHeader& header);

// DATA_LOSS for a wrong magic number or checksum, FAILED_PRECONDITION for another protocol version,
// INVALID_ARGUMENT for an unknown type or a field out of its range.
absl::StatusOr<FrameHeader> DecodeHeader(std::span<const std::byte, kFrameHeaderBytes> bytes);

// XXH3-64 of a control frame's payload.
uint64_t PayloadDigest(std::span<const std::byte> payload);

}  // namespace tandem::kvtransfer
