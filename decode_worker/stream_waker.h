// Runs the takers of token streams away from the loop's thread.
#pragma once

#include <memory>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

#include "decode_worker/token_stream.h"

namespace tandem::decode {

// Thread-safe. Its queue is bounded by what is idle: a stream stands in it at most once, because
// only an idle taker is woken and it is idle again only after it was.
class StreamWaker {
 public:
  StreamWaker();
  // Wakes what was given before.
  ~StreamWaker();
  StreamWaker(const StreamWaker&) = delete;
  StreamWaker& operator=(const StreamWaker&) = delete;

  // Never blocks. Each stream's Wake() is called once, in this order.
  void Wake(std::vector<std::shared_ptr<TokenStream>> idle);

 private:
  void Run();

  absl::Mutex mutex_;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<std::shared_ptr<TokenStream>> idle_ ABSL_GUARDED_BY(mutex_);
  std::thread thread_;  // last: it uses the members above
};

}  // namespace tandem::decode
