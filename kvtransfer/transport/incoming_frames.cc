#include "kvtransfer/transport/incoming_frames.h"

#include <algorithm>
#include <utility>

#include "spdlog/spdlog.h"

#include "common/base/status.h"

namespace tandem::kvtransfer {

class IncomingFrames::Landing {
 public:
  explicit Landing(Frame frame) : frame_(std::move(frame)) {
    uint64_t at = 0;
    for (const TargetPiece& piece : frame_.reception->pieces()) {
      if (piece.wanted) pieces_.push_back({at, piece.target_offset, piece.bytes});
      at += piece.bytes;
    }
  }

  void Start() {
    if (frame_.fetch) fetched_ = frame_.fetch();
  }
  // Into the pool, if the transfer still wants it.
  absl::Status Land() {
    if (fetched_ != nullptr) {
      TANDEM_RETURN_IF_ERROR(fetched_->Wait());
      if (!pieces_.empty()) {
        (void)frame_.reception->WriteGuarded([this] { fetched_->Scatter(pieces_); });
      }
      fetched_ = nullptr;
      if (frame_.release) frame_.release();
    }
    frame_.reception->Done();
    return absl::OkStatus();
  }

 private:
  const Frame frame_;
  std::vector<CopyPiece> pieces_;
  std::unique_ptr<Fetched> fetched_;
};

IncomingFrames::IncomingFrames(KvConnection* connection, size_t threads, bool waits_for_writer)
    : connection_(connection), waits_for_writer_(waits_for_writer) {
  for (size_t i = 0; i < threads; ++i) threads_.emplace_back([this] { LandAll(); });
}

void IncomingFrames::Take(Frame frame, uint64_t bytes) {
  auto landing = std::make_unique<Landing>(std::move(frame));
  {
    absl::MutexLock lock(&mutex_);
    if (bytes > kSmallFrameBytes || waits_for_writer_ || !waiting_.empty() || !started_.empty() ||
        landing_ > 0) {
      waiting_.push_back(std::move(landing));
      StartWaiting();
      return;
    }
  }
  // The threads have nothing to do until the caller, who alone adds to `waiting_`, gives them some.
  landing->Start();
  if (const absl::Status landed = landing->Land(); !landed.ok()) connection_->Shutdown();
}

void IncomingFrames::Stop() {
  {
    absl::MutexLock lock(&mutex_);
    closing_ = true;
  }
  for (std::thread& thread : threads_) {
    if (thread.joinable()) thread.join();
  }
  absl::MutexLock lock(&mutex_);
  started_.clear();
  waiting_.clear();
}

void IncomingFrames::StartWaiting() {
  while (!waiting_.empty() && landing_ + started_.size() < kStagedDepth) {
    waiting_.front()->Start();
    started_.push_back(std::move(waiting_.front()));
    waiting_.pop_front();
  }
}

// A thread's work. What comes first is fetched first; it may be over after what came later.
void IncomingFrames::LandAll() {
  while (std::unique_ptr<Landing> landing = NextStarted()) {
    const absl::Status landed = landing->Land();
    landing = nullptr;
    absl::MutexLock lock(&mutex_);
    --landing_;
    if (landed.ok() && !closing_) StartWaiting();
    if (landed.ok() || closing_) continue;
    spdlog::warn("kv connection from {}: {}", connection_->peer(), MessageOf(landed));
    closing_ = true;
    connection_->Shutdown();
  }
}

// Null: the end.
std::unique_ptr<IncomingFrames::Landing> IncomingFrames::NextStarted() {
  absl::MutexLock lock(&mutex_);
  const auto due = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return closing_ || !started_.empty();
  };
  mutex_.Await(absl::Condition(&due));
  if (closing_) return nullptr;
  std::unique_ptr<Landing> landing = std::move(started_.front());
  started_.pop_front();
  ++landing_;
  return landing;
}

bool AnyWanted(Reception* reception) {
  return std::any_of(reception->pieces().begin(), reception->pieces().end(),
                     [](const TargetPiece& piece) { return piece.wanted; });
}

}  // namespace tandem::kvtransfer
