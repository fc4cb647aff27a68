// Everything that reaches the decode loop from other threads.
#pragma once

#include <memory>
#include <variant>

#include "common/base/inbox.h"
#include "common/base/transfer_id.h"
#include "decode_worker/prefill_caller.h"
#include "decode_worker/request.h"
#include "decode_worker/token_stream.h"
#include "kvtransfer/channel/kv_endpoints.h"

namespace tandem::decode {

struct WorkArrived {
  DecodeWork work;
  std::shared_ptr<TokenStream> stream;
};
struct WorkCancelled {  // by the client, its deadline, or a broken connection
  uint64_t id = 0;      // DecodeWork::id; unknown ones are ignored
};
struct KvSealed {
  TransferId id;
  uint64_t epoch = 0;
  kvtransfer::TransferStats stats;
};
struct KvFailed {
  TransferId id;
  uint64_t epoch = 0;
  absl::Status status;
};
struct KvQuiet {
  TransferId id;
  uint64_t epoch = 0;
};
struct SnapshotWanted {};  // a router joined: it needs all block hashes
struct DrainWanted {};     // refuse new work, finish what runs, then stop
struct StopWanted {};      // end all streams and stop

using DecodeEvent = std::variant<WorkArrived, WorkCancelled, PrefillReply, KvSealed, KvFailed,
                                 KvQuiet, SnapshotWanted, DrainWanted, StopWanted>;

// Work is refused when it is full; all other events get in.
using DecodeInbox = Inbox<DecodeEvent>;

}  // namespace tandem::decode
