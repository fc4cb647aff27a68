#include "common/base/file_watch.h"

#include <utility>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "spdlog/spdlog.h"

#include "common/base/file.h"
#include "common/base/status.h"

namespace tandem {
namespace {

constexpr absl::Duration kLook = absl::Seconds(1);
constexpr absl::Duration kSayAgain = absl::Minutes(1);
constexpr size_t kMaxFileBytes = 16 << 20;

bool IsSame(const FileWatch::Contents& a, const FileWatch::Contents& b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i].status() != b[i].status() || (a[i].ok() && *a[i] != *b[i])) return false;
  }
  return true;
}

}  // namespace

FileWatch::Contents FileWatch::Read(const std::vector<std::string>& paths) {
  Contents contents;
  for (const std::string& path : paths) contents.push_back(ReadFile(path, kMaxFileBytes));
  return contents;
}

FileWatch::FileWatch(std::vector<std::string> paths, Contents taken,
                     std::function<absl::Status(const Contents&)> take)
    : paths_(std::move(paths)), take_(std::move(take)), taken_(std::move(taken)) {
  thread_ = std::thread([this] { Run(); });
}

FileWatch::~FileWatch() {
  {
    absl::MutexLock lock(&mutex_);
    closing_ = true;
  }
  thread_.join();
}

void FileWatch::Run() {
  Contents before = taken_;
  absl::Status status;
  absl::Time said_at = absl::InfinitePast();
  while (true) {
    {
      absl::MutexLock lock(&mutex_);
      if (mutex_.AwaitWithTimeout(absl::Condition(&closing_), kLook)) return;
    }
    Contents now = Read(paths_);
    if (IsSame(now, before) && !IsSame(now, taken_)) {
      status = take_(now);
      taken_ = now;
      said_at = absl::InfinitePast();
    }
    if (!status.ok() && absl::Now() >= said_at + kSayAgain) {
      spdlog::error("{}; what was in force before stays so", MessageOf(status));
      said_at = absl::Now();
    }
    before = std::move(now);
  }
}

}  // namespace tandem
