#include "common/base/log_writer.h"

#include <cerrno>
#include <pthread.h>
#include <unistd.h>
#include <utility>

namespace tandem {
namespace {

// A descriptor that nobody can write to any more is no reason to stop.
void WriteAll(int fd, std::string_view text) {
  while (!text.empty()) {
    const ssize_t written = write(fd, text.data(), text.size());
    if (written < 0 && errno != EINTR) return;
    if (written > 0) text.remove_prefix(static_cast<size_t>(written));
  }
}

}  // namespace

LogWriter::LogWriter(int fd, size_t max_bytes, std::function<std::string(uint64_t)> note_lost)
    : fd_(fd), max_bytes_(max_bytes), note_lost_(std::move(note_lost)), thread_([this] { Run(); }) {
  pthread_setname_np(thread_.native_handle(), "tandem-log");
}

LogWriter::~LogWriter() {
  {
    absl::MutexLock lock(&mutex_);
    stopping_ = true;
  }
  thread_.join();
}

void LogWriter::Write(std::string_view line) {
  absl::MutexLock lock(&mutex_);
  // Those behind a lost line are lost too, until it is said how many there were.
  if (lost_ > 0 || waiting_.size() + line.size() > max_bytes_) {
    ++lost_;
    return;
  }
  waiting_ += line;
}

bool LogWriter::Drain(absl::Duration bound) {
  absl::MutexLock lock(&mutex_);
  return mutex_.AwaitWithTimeout(absl::Condition(this, &LogWriter::Drained), bound);
}

bool LogWriter::Next(std::string* text, uint64_t* lost) {
  absl::MutexLock lock(&mutex_);
  writing_ = false;
  mutex_.Await(absl::Condition(this, &LogWriter::HasWork));
  *text = std::exchange(waiting_, {});
  *lost = std::exchange(lost_, 0);
  writing_ = true;
  return !text->empty() || *lost > 0;
}

void LogWriter::Run() {
  std::string text;
  uint64_t lost = 0;
  while (Next(&text, &lost)) {
    if (lost > 0) text += note_lost_(lost);
    WriteAll(fd_, text);
  }
}

}  // namespace tandem
