// What one end of KV transfers has counted since it started. channel/kv_counter_block.h counts it,
// and exports every count as a metric.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace tandem::kvtransfer {

// Why a transfer did not end sealed.
enum class KvFailure {
  kDigestMismatch,  // bytes in the pool are not the bytes that were sent
  kIncomplete,      // the sender finished, but pieces never arrived
  kConnectionLost,  // the connection died, or was never made
  kPeerAborted,     // the other end gave up
  kCancelled,       // this end gave up
  kTimeout,         // no answer in time
  kInvalid,         // a malformed push, or a frame that breaks the protocol
};
inline constexpr size_t kNumKvFailures = 7;
// As a metric label: "digest_mismatch", ...
inline constexpr std::array<std::string_view, kNumKvFailures> kKvFailureNames = {
    "digest_mismatch", "incomplete", "connection_lost", "peer_aborted",
    "cancelled",       "timeout",    "invalid"};

// A snapshot.
struct KvTransferCounters {
  uint64_t bytes = 0;                                  // KV payload sent, or written to the pool
  uint64_t transfers = 0;                              // sealed
  std::array<uint64_t, kNumKvFailures> failures = {};  // by KvFailure
  uint64_t late_frames = 0;          // dropped: their transfer is over, cancelled or unknown
  uint64_t duplicate_frames = 0;     // dropped: those bytes had arrived before
  uint64_t auth_failures = 0;        // wrong token, or data before any token
  uint64_t refused_connections = 0;  // other layout, capability or protocol, or too many
  uint64_t connections_opened = 0;
  uint64_t transport_fallbacks = 0;  // connections over another transport than the best common one
  uint64_t slow_links = 0;           // connections found slower than their transport should be
  uint64_t fenced_transfers = 0;     // whose blocks waited for the end of a one-sided writer

  uint64_t failed(KvFailure reason) const { return failures[static_cast<size_t>(reason)]; }
};

}  // namespace tandem::kvtransfer
