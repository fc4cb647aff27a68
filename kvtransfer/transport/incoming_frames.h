// Frames on their way into a pool, for readers that bring them to its memory first: what those of
// shm_ring and nccl share. Up to kStagedDepth of them are brought at a time, as soon as they have
// come, so that the link is busy while one is scattered and digested. Threads do that in turns; of
// one transfer's frames only one at a time, so more than one or two wait for each other. A small
// frame with nothing before it is done where it comes, if its bytes are there: to wake a thread
// takes longer.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"

#include "kvtransfer/store/staged_copies.h"
#include "kvtransfer/transport/kv_connection.h"
#include "kvtransfer/transport/kv_transport.h"

namespace tandem::kvtransfer {

class IncomingFrames {
 public:
  struct Frame {
    std::shared_ptr<Reception> reception;
    // Starts to bring its bytes; does not wait. In the order of Take(), one at a time. Null: there
    // is nothing to bring.
    std::function<std::unique_ptr<Fetched>()> fetch;
    // Its bytes are no longer needed where they came from.
    std::function<void()> release;
  };
  // `connection` outlives it. `waits_for_writer`: the bytes of a frame may come after its header,
  // or never; only the threads wait for them.
  IncomingFrames(KvConnection* connection, size_t threads, bool waits_for_writer);
  ~IncomingFrames() { Stop(); }

  // Belongs to one thread. `bytes`: of its payload. A frame whose bytes do not come ends the
  // connection.
  void Take(Frame frame, uint64_t bytes);
  // No reception is called once it has returned. Waits for what is under way.
  void Stop();

 private:
  class Landing;

  void LandAll();
  std::unique_ptr<Landing> NextStarted();
  void StartWaiting() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  KvConnection* const connection_;
  const bool waits_for_writer_;
  absl::Mutex mutex_;
  // In their order: those that a thread lands, those that are brought, those that wait.
  size_t landing_ ABSL_GUARDED_BY(mutex_) = 0;
  std::deque<std::unique_ptr<Landing>> started_ ABSL_GUARDED_BY(mutex_);
  std::deque<std::unique_ptr<Landing>> waiting_ ABSL_GUARDED_BY(mutex_);
  bool closing_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<std::thread> threads_;
};

// Whether anything of a frame is wanted.
bool AnyWanted(Reception* reception);

}  // namespace tandem::kvtransfer
