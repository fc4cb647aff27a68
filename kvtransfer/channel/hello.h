// What the two ends of a channel tell each other before anything else, and why they may refuse.
#pragma once

#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#include "common/base/kv_layout.h"

namespace tandem::kvtransfer {

struct Hello {
  std::string worker_id;
  std::string capability_digest;
  KvLayout layout;
  int num_blocks = 0;

  bool operator==(const Hello&) const = default;
};

inline constexpr size_t kMaxHelloText = 512;  // bytes of worker_id, and of capability_digest

// Little-endian: u32 protocol version; i32 layers, kv_heads, head_dim, block_size, dtype,
// num_blocks; then each text as u16 length and bytes.
std::string EncodeHello(const Hello& hello);

// INVALID_ARGUMENT if malformed or with an impossible layout, FAILED_PRECONDITION for another
// protocol version.
absl::StatusOr<Hello> DecodeHello(std::span<const std::byte> payload);

// OK if blocks of one pool fit the other; else FAILED_PRECONDITION with one line that says what
// differs. The numbers of blocks and worker ids may differ.
absl::Status CheckCompatible(const Hello& here, const Hello& peer);

// OK if `hello` can be encoded and decoded: text lengths and layout.
absl::Status ValidateHello(const Hello& hello);

}  // namespace tandem::kvtransfer
