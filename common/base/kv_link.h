// What is known of the way from one worker's KV pool into another's: a plain value, which a sender
// of blocks measures, reports to the router, and the router shows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

namespace tandem {

// The self-test that is made when the two connect, after a pattern came out right at the other end.
// Rates are bytes per second, until the other end has said that they are there; 0: not measured.
struct KvLinkTest {
  double small_rate = 0;       // 64 KiB
  double medium_rate = 0;      // 1 MiB
  double large_rate = 0;       // large_bytes in a row
  uint64_t large_bytes = 0;    // 64 MiB, or less where the time was short
  double latency_seconds = 0;  // of the smallest message, there and back

  // Of the longest run that was measured; 0: of none.
  double rate() const {
    return large_rate > 0 ? large_rate : medium_rate > 0 ? medium_rate : small_rate;
  }
  // The best that was seen: what it can do, even if the machine was busy for a moment.
  double best_rate() const { return std::max({small_rate, medium_rate, large_rate}); }

  bool operator==(const KvLinkTest&) const = default;
};

struct KvLink {
  // Of recent transfers; before there are any, what the self-test found. 0: not known, or refused.
  double bytes_per_second = 0;
  std::string transport;  // "tcp"; empty: none was agreed on
  KvLinkTest test;
  double least_bytes_per_second = 0;  // what it should reach
  bool slow = false;                  // was found to reach less
  bool refused = false;               // carries nothing: the self-test failed, or found it too slow
  std::string note;                   // why it is refused, or why it has no better transport

  bool operator==(const KvLink&) const = default;
};

}  // namespace tandem
