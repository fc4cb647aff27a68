// What can become of a message between two parts of a simulated cluster.
#pragma once

#include <functional>
#include <string_view>

#include "absl/time/time.h"

namespace tandem {

struct Message {
  enum class Kind {
    kReport,        // worker -> router, on the stream of its stay
    kCall,          // router -> decode worker: a request
    kTokens,        // and what comes back on its stream
    kPrefillCall,   // decode worker -> prefill worker
    kPrefillReply,  // and back, as is what it wants
    kKvFrame,       // from the worker that holds blocks to the one that takes them
    kKvAnswer,      // and back
  };
  Kind kind;
  std::string_view from, to;  // worker ids; "router"
};

struct Fate {
  absl::Duration delay;    // beyond what the link takes; what follows on a stream waits too
  bool lost = false;       // a stream or call breaks by it; of KV the one frame is missing
  bool twice = false;      // reports, prefill calls and KV frames
  bool overtaken = false;  // by what follows: load reports and KV frames
  bool flipped = false;    // one bit of a KV frame's payload
  bool misplaced = false;  // a KV frame names other blocks than it carries
  bool cut = false;        // half of it arrives and the connection ends: KV
};

// Asked for every message, in the order in which they are sent. Empty: nothing happens to any.
using Faults = std::function<Fate(const Message&)>;

}  // namespace tandem
