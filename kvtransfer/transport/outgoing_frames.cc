#include "kvtransfer/transport/outgoing_frames.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "common/base/clock.h"
#include "common/base/ready_event.h"
#include "common/base/status.h"

namespace tandem::kvtransfer {

class OutgoingFrames::Frame {
 public:
  Frame(const FrameHeader& header, const BlockRun& run)
      : header_(header), run_(run), blocks_(run.source_blocks.begin(), run.source_blocks.end()) {
    run_.source_blocks = blocks_;
    run_.target_blocks = {};
  }
  Frame(const Frame&) = delete;

  // Into the room that was taken.
  void Start(const Way& way, KvConnection* connection, absl::Duration io_timeout) {
    gathering_ = way.start(&header_, run_);
    header_sent_ = way.waits_for_reader;
    if (header_sent_) status_ = connection->Send(header_, {}, io_timeout);
  }
  // Waits for what was started.
  void Land(KvConnection* connection, absl::Duration io_timeout) {
    const absl::Status gathered = gathering_->Wait();
    digests_.assign(gathering_->digests().begin(), gathering_->digests().end());
    gathering_ = nullptr;
    if (status_.ok()) status_ = gathered;
    if (status_.ok() && !header_sent_) status_ = connection->Send(header_, {}, io_timeout);
    ended_.Set();
  }
  void Fail(absl::Status status) {
    status_ = std::move(status);
    ended_.Set();
  }
  bool ended() const { return ended_.Ready(); }
  void AwaitEnd() const { ended_.WaitFor(absl::InfiniteDuration()); }
  // Once it has ended.
  const absl::Status& status() const { return status_; }
  std::span<const uint64_t> digests() const { return digests_; }

 private:
  FrameHeader header_;
  BlockRun run_;
  const std::vector<int32_t> blocks_;
  bool header_sent_ = false;
  std::unique_ptr<Gathering> gathering_;
  std::vector<uint64_t> digests_;
  absl::Status status_;
  HostEvent ended_;
};

class OutgoingFrames::FramePost : public KvPost {
 public:
  FramePost(OutgoingFrames* frames, std::shared_ptr<Frame> frame)
      : frames_(frames), frame_(std::move(frame)) {}
  ~FramePost() override {
    Abandon();
    frame_->AwaitEnd();
  }
  bool Done() override { return frame_->ended(); }
  const absl::Status& status() const override { return frame_->status(); }
  std::span<const uint64_t> digests() const override { return frame_->digests(); }
  void Abandon() override { frames_->Abandon(frame_.get()); }

 private:
  OutgoingFrames* const frames_;
  const std::shared_ptr<Frame> frame_;
};

OutgoingFrames::OutgoingFrames(KvConnection* connection, absl::Duration io_timeout, Way way)
    : connection_(connection),
      io_timeout_(io_timeout),
      way_(std::move(way)),
      thread_([this] { SendAll(); }) {}

std::unique_ptr<KvPost> OutgoingFrames::Post(const FrameHeader& header, const BlockRun& run,
                                             uint64_t bytes) {
  const auto frame = std::make_shared<Frame>(header, run);
  if (bytes > kSmallFrameBytes || way_.waits_for_reader || !SendAtOnce(frame.get())) {
    absl::MutexLock lock(&mutex_);
    waiting_.push_back(frame);
  }
  return std::make_unique<FramePost>(this, frame);
}

void OutgoingFrames::Stop() {
  if (!thread_.joinable()) return;
  {
    absl::MutexLock lock(&mutex_);
    closing_ = true;
  }
  thread_.join();
}

// Unless something is before it, or there is no room.
bool OutgoingFrames::SendAtOnce(Frame* frame) {
  {
    absl::MutexLock lock(&mutex_);
    // What waited for room may have been given up, and the thread waits on.
    if (!waiting_.empty() || under_way_ > 0 || awaits_room_) return false;
  }
  // The thread has nothing to do until the caller, who alone adds to `waiting_`, gives it some.
  if (!way_.take_room()) return false;
  frame->Start(way_, connection_, io_timeout_);
  frame->Land(connection_, io_timeout_);
  return true;
}

// If it has not begun.
void OutgoingFrames::Abandon(Frame* frame) {
  {
    absl::MutexLock lock(&mutex_);
    const auto it = std::find_if(waiting_.begin(), waiting_.end(),
                                 [&](const auto& waiting) { return waiting.get() == frame; });
    if (it == waiting_.end()) return;
    frame->Fail(Cancelled("given up"));
    waiting_.erase(it);
  }
  connection_->Interrupt();
}

// The thread.
void OutgoingFrames::SendAll() {
  std::deque<std::shared_ptr<Frame>> started;
  absl::Time stuck_since = absl::InfiniteFuture();
  while (AwaitWork(/*idle=*/started.empty())) {
    while (started.size() < kStagedDepth) {
      const std::shared_ptr<Frame> next = StartNext();
      if (next == nullptr) break;
      started.push_back(next);
    }
    if (started.empty()) {  // no room
      const absl::Time now = Clock::Real()->Now();
      stuck_since = std::min(stuck_since, now);
      if (now - stuck_since >= io_timeout_) FailWaiting();
      way_.await_room();
      absl::MutexLock lock(&mutex_);
      awaits_room_ = false;
      continue;
    }
    stuck_since = absl::InfiniteFuture();
    started.front()->Land(connection_, io_timeout_);
    started.pop_front();
    {
      absl::MutexLock lock(&mutex_);
      --under_way_;
    }
    connection_->Interrupt();
  }
}

// False: the end, and nothing is under way.
bool OutgoingFrames::AwaitWork(bool idle) {
  absl::MutexLock lock(&mutex_);
  const auto due = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return closing_ || !waiting_.empty();
  };
  if (idle) mutex_.Await(absl::Condition(&due));
  return !idle || !waiting_.empty();
}

// Null: nothing waits, or there is no room.
std::shared_ptr<OutgoingFrames::Frame> OutgoingFrames::StartNext() {
  std::shared_ptr<Frame> frame;
  {
    absl::MutexLock lock(&mutex_);
    awaits_room_ = !waiting_.empty() && !way_.take_room();
    if (waiting_.empty() || awaits_room_) return nullptr;
    frame = std::move(waiting_.front());
    waiting_.pop_front();
    ++under_way_;
  }
  frame->Start(way_, connection_, io_timeout_);
  return frame;
}

void OutgoingFrames::FailWaiting() {
  {
    absl::MutexLock lock(&mutex_);
    for (const auto& frame : waiting_) {
      frame->Fail(Unavailable("{} has made no room for frames for {}", connection_->peer(),
                              absl::FormatDuration(io_timeout_)));
    }
    waiting_.clear();
  }
  connection_->Interrupt();
}

}  // namespace tandem::kvtransfer
