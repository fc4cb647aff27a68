// What one end of KV transfers has counted since it started; workers export it as metrics.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace tandem::kvtransfer {

// Why a transfer did not end sealed.
enum class KvFailure {
  kDigestMismatch,  // bytes in the pool are not the bytes that were sent
  kIncomplete,      // the sender finished, but pieces never arrived
  kChannelLost,     // the connection died, or was never made
  kPeerAborted,     // the other end gave up
  kCancelled,       // this end gave up
  kTimeout,         // no answer in time
  kInvalid,         // a malformed push, or a frame that breaks the protocol
};
inline constexpr size_t kNumKvFailures = 7;
// As a metric label: "digest_mismatch", ...
inline constexpr std::array<std::string_view, kNumKvFailures> kKvFailureNames = {
    "digest_mismatch", "incomplete", "channel_lost", "peer_aborted",
    "cancelled",       "timeout",    "invalid"};

// A snapshot.
struct KvTransferCounters {
  uint64_t bytes = 0;                                  // KV payload sent, or written to the pool
  uint64_t transfers = 0;                              // sealed
  std::array<uint64_t, kNumKvFailures> failures = {};  // by KvFailure
  uint64_t late_frames = 0;       // dropped: their transfer is over, cancelled or unknown
  uint64_t duplicate_frames = 0;  // dropped: those bytes had arrived before
  uint64_t auth_failures = 0;     // wrong token, or data before any token
  uint64_t refused_channels = 0;  // other layout, capability or protocol, or too many channels
  uint64_t channels_opened = 0;

  uint64_t failed(KvFailure reason) const { return failures[static_cast<size_t>(reason)]; }
};

// The same, being counted. Thread-safe.
struct KvCounterBlock {
  std::atomic<uint64_t> bytes{0};
  std::atomic<uint64_t> transfers{0};
  std::array<std::atomic<uint64_t>, kNumKvFailures> failures = {};
  std::atomic<uint64_t> late_frames{0};
  std::atomic<uint64_t> duplicate_frames{0};
  std::atomic<uint64_t> auth_failures{0};
  std::atomic<uint64_t> refused_channels{0};
  std::atomic<uint64_t> channels_opened{0};

  void CountFailure(KvFailure reason) { ++failures[static_cast<size_t>(reason)]; }
  KvTransferCounters Snapshot() const {
    KvTransferCounters out;
    out.bytes = bytes;
    out.transfers = transfers;
    for (size_t i = 0; i < kNumKvFailures; ++i) out.failures[i] = failures[i];
    out.late_frames = late_frames;
    out.duplicate_frames = duplicate_frames;
    out.auth_failures = auth_failures;
    out.refused_channels = refused_channels;
    out.channels_opened = channels_opened;
    return out;
  }
};

}  // namespace tandem::kvtransfer
