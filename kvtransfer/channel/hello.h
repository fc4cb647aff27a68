// What the two ends of a connection tell each other before anything else, and why they may refuse.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#include "kvtransfer/plan/copy_plan.h"

namespace tandem::kvtransfer {

// A transport that an end can use. From the receiver: how to reach its pool by it.
struct TransportOffer {
  std::string name;
  std::string advert;

  bool operator==(const TransportOffer&) const = default;
};

struct Hello {
  std::string worker_id;
  std::string capability_digest;
  KvPoolShape shape;
  std::vector<TransportOffer> transports;

  bool operator==(const Hello&) const = default;
};

inline constexpr size_t kMaxHelloText = 512;  // bytes of worker_id, and of capability_digest
inline constexpr size_t kMaxOffers = 8;
inline constexpr size_t kMaxTransportName = 32;

// Little-endian: u32 protocol version, u32 digest version; i32 layers, kv_heads, head_dim,
// block_size, dtype, num_blocks, first_head; worker id and capability digest; u16 number of
// transports, each a name and an advert. Texts are u16 length and bytes.
std::string EncodeHello(const Hello& hello);

// INVALID_ARGUMENT if malformed or with an impossible layout, FAILED_PRECONDITION for another
// protocol or digest version.
absl::StatusOr<Hello> DecodeHello(std::span<const std::byte> payload);

// OK if blocks of `sender`'s pool can fill those of `receiver`'s; else FAILED_PRECONDITION with one
// line that says what differs. What can be converted may differ: the number of blocks, and the
// heads, as long as the sender has all that the receiver holds.
absl::Status CheckCompatible(const Hello& receiver, const Hello& sender);

// OK if `hello` can be encoded and decoded: text lengths and shape.
absl::Status ValidateHello(const Hello& hello);

}  // namespace tandem::kvtransfer
