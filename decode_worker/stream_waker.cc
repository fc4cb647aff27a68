#include "decode_worker/stream_waker.h"

#include <iterator>
#include <utility>

namespace tandem::decode {

StreamWaker::StreamWaker() : thread_([this] { Run(); }) {}

StreamWaker::~StreamWaker() {
  {
    absl::MutexLock lock(&mutex_);
    stopping_ = true;
  }
  thread_.join();
}

void StreamWaker::Wake(std::vector<std::shared_ptr<TokenStream>> idle) {
  absl::MutexLock lock(&mutex_);
  if (idle_.empty()) {
    idle_ = std::move(idle);
  } else {
    idle_.insert(idle_.end(), std::make_move_iterator(idle.begin()),
                 std::make_move_iterator(idle.end()));
  }
}

void StreamWaker::Run() {
  const auto due = [this]() ABSL_NO_THREAD_SAFETY_ANALYSIS { return stopping_ || !idle_.empty(); };
  while (true) {
    std::vector<std::shared_ptr<TokenStream>> idle;
    {
      absl::MutexLock lock(&mutex_);
      mutex_.Await(absl::Condition(&due));
      if (idle_.empty()) return;
      idle.swap(idle_);
    }
    for (const auto& stream : idle) stream->Wake();
  }
}

}  // namespace tandem::decode
