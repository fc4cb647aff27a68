// What a worker tells the router of its load and speed: a plain value, shared by workers and
// router; common/rpc/load_wire.h turns it into the message of the same name.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "common/base/kv_link.h"

namespace tandem {

struct LoadReport {
  int running = 0;
  int waiting = 0;             // for blocks, for a prefill elsewhere, or preempted
  int64_t waiting_tokens = 0;  // prompt tokens queued and not yet computed
  int blocks_free = 0;
  int blocks_cached = 0;
  int blocks_used = 0;
  int blocks_quarantined = 0;
  // Of a decode worker: the most blocks that a new request may need to be admitted now; 0: none is.
  // Quarantine, what running sequences take next and who waits to come back are taken into account.
  int admits_blocks = 0;
  // Of those, promised to requests whose prompts wait to be asked for, and which hold nothing yet:
  // a request may use them unless its prompt, too, is computed elsewhere.
  int promised_blocks = 0;
  int promised_sequences = 0;            // these requests; `waiting` counts them as well
  double prefill_tokens_per_second = 0;  // fitted over recent steps; 0: not known yet
  double prefill_fit_tokens = 0;         // that it was fitted over; 0: not said, the rate is sure
  // How fast a queue of prompts goes down, by batches that were well filled; 0: too few were seen.
  double saturated_tokens_per_second = 0;
  double decode_step_milliseconds = 0;  // recent median; 0: not known yet
  // Of a decode worker: prefill workers that failed it and have served it nothing since, by id.
  struct PrefillFailures {
    int in_a_row = 0;
    double seconds_ago = 0;  // the last one
  };
  std::map<std::string, PrefillFailures> prefill_failures;
  // Of a decode worker: prompt tokens that it will ask prefill workers for, by their ids.
  std::map<std::string, int64_t> prefill_backlog;
  // Its ways to the workers that it shipped blocks to, by their ids.
  std::map<std::string, KvLink> links;
};

}  // namespace tandem
