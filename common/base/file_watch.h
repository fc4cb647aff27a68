// Looks about every second at some small files, and hands over what they hold when that has
// changed.
//
// Their bytes are compared: no time stamp has to be trusted, and a link that points elsewhere,
// which is how Kubernetes changes its secrets, is seen too. Only what two looks in a row have found
// is handed over, so that no half of a file is, while it is written, nor one of two files that
// belong together.
#pragma once

#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"

namespace tandem {

class FileWatch {
 public:
  // What each of the files holds, or why it cannot be read.
  using Contents = std::vector<absl::StatusOr<std::string>>;
  static Contents Read(const std::vector<std::string>& paths);

  // `taken` is what is known of the files already. `take` is called from a thread of the watch's;
  // what it says against new contents is logged as an error at once, and then every minute until it
  // takes others: "...; what was in force before stays so".
  FileWatch(std::vector<std::string> paths, Contents taken,
            std::function<absl::Status(const Contents&)> take);
  ~FileWatch();

 private:
  void Run();

  const std::vector<std::string> paths_;
  const std::function<absl::Status(const Contents&)> take_;
  Contents taken_;  // only the thread
  absl::Mutex mutex_;
  bool closing_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;  // last: it uses the rest
};

}  // namespace tandem
