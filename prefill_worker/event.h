// Everything that reaches the prefill loop from other threads.
#pragma once

#include <cstdint>
#include <variant>

#include "absl/status/status.h"

#include "common/base/inbox.h"
#include "common/base/transfer_id.h"
#include "kvtransfer/channel/kv_endpoints.h"
#include "prefill_worker/request.h"
#include "worker/reports.h"

namespace tandem::prefill {

struct WorkArrived {
  Work work;
};
struct WorkCancelled {  // by the caller, its deadline, or a broken connection
  uint64_t id = 0;      // Work::id; unknown ones are ignored
};
struct KvSealed {  // KvReceiver's callbacks
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
struct KvShipped {  // KvSender::on_done
  TransferId id;
  uint64_t epoch = 0;
  absl::Status status;
  kvtransfer::TransferStats stats;
};

using Event = std::variant<WorkArrived, WorkCancelled, KvSealed, KvFailed, KvQuiet, KvShipped,
                           worker::SnapshotWanted, worker::DrainWanted, worker::StopWanted>;

// Work is refused when it is full; all other events get in.
using EventInbox = Inbox<Event>;

}  // namespace tandem::prefill
