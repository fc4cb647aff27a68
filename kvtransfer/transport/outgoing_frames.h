// Frames on their way out of a pool whose posts end later: what the writers of shm_ring and nccl
// share. Up to kStagedDepth frames are under way; the others wait for room. They end in the order
// in which they were posted, on a thread of their own. A small frame with nothing before it is done
// where it is posted, if no peer has a say in how long that takes: to wake a thread takes longer.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "kvtransfer/store/staged_copies.h"
#include "kvtransfer/transport/kv_connection.h"
#include "kvtransfer/transport/kv_transport.h"

namespace tandem::kvtransfer {

class OutgoingFrames {
 public:
  // What a frame goes through. One thread at a time calls it, and nothing of it but await_room
  // waits.
  struct Way {
    // Takes room for one frame, if there is some.
    std::function<bool()> take_room;
    // Starts to move the pages of a frame into the room that was taken; may write payload_digest of
    // its header, which is the transport's.
    std::function<std::unique_ptr<Gathering>(FrameHeader*, const BlockRun&)> start;
    // Waits a moment for room.
    std::function<void()> await_room;
    // The pages of a frame move only when the reader does something for it. So its header goes out
    // when it has been started, else when its pages are there; and only the thread waits for it.
    bool waits_for_reader = false;
  };
  // `connection` outlives it. What finds no room for `io_timeout` fails.
  OutgoingFrames(KvConnection* connection, absl::Duration io_timeout, Way way);
  ~OutgoingFrames() { Stop(); }

  // Belongs to one thread. `bytes`: of the run.
  std::unique_ptr<KvPost> Post(const FrameHeader& header, const BlockRun& run, uint64_t bytes);
  // After the last post was released.
  void Stop();

 private:
  class Frame;
  class FramePost;

  bool SendAtOnce(Frame* frame);
  void Abandon(Frame* frame);
  void SendAll();
  bool AwaitWork(bool idle);
  std::shared_ptr<Frame> StartNext();
  void FailWaiting();

  KvConnection* const connection_;
  const absl::Duration io_timeout_;
  const Way way_;  // the thread's, while something waits or is under way
  absl::Mutex mutex_;
  std::deque<std::shared_ptr<Frame>> waiting_ ABSL_GUARDED_BY(mutex_);
  size_t under_way_ ABSL_GUARDED_BY(mutex_) = 0;      // started by the thread
  bool awaits_room_ ABSL_GUARDED_BY(mutex_) = false;  // the thread, of the way
  bool closing_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;  // last: starts when everything else is there
};

}  // namespace tandem::kvtransfer
