// What is known of the way from one worker's KV pool into another's: a plain value, which a sender
// of blocks measures, reports to the router, and the router shows.
#pragma once

#include <cstdint>
#include <string>

namespace tandem {

// The self-test that was made when the two connected. Rates are bytes per second, of so much that
// was sent and verified at the other end; 0: not measured.
struct KvLinkTest {
  double small_rate = 0;   // 64 KiB
  double medium_rate = 0;  // 1 MiB
  double large_rate = 0;   // large_bytes in a row
  // 64 MiB, or less where the pool or the time was short; 0: the rate is that of cards.
  uint64_t large_bytes = 0;
  double latency_seconds = 0;  // of the smallest message, there and back

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
