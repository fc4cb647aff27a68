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
#include "worker/reports.h"

namespace tandem::decode {

struct WorkArrived {
  Work work;
  std::shared_ptr<TokenStream> stream;
};
struct WorkCancelled {  // by the client, its deadline, or a broken connection
  uint64_t id = 0;      // Work::id; unknown ones are ignored
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
struct KvGiven {  // KvSender::on_done
  TransferId id;
  uint64_t epoch = 0;
  absl::Status status;
  kvtransfer::TransferStats stats;
};

using Event =
    std::variant<WorkArrived, WorkCancelled, PrefillReply, BlocksWanted, KvSealed, KvFailed,
                 KvQuiet, KvGiven, worker::SnapshotWanted, worker::DrainWanted, worker::StopWanted>;

// Work is refused when it is full; all other events get in.
using EventInbox = Inbox<Event>;

}  // namespace tandem::decode
