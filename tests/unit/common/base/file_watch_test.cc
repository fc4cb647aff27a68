#include "common/base/file_watch.h"

#include <algorithm>
#include <string>
#include <unistd.h>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "gtest/gtest.h"

#include "common/base/status.h"
#include "tests/support/temp_dir.h"

namespace tandem {
namespace {

// What a watch has handed over, as text: "-" for what could not be read.
class Taken {
 public:
  absl::Status Take(const FileWatch::Contents& contents) {
    std::string text;
    for (const auto& content : contents) text += (content.ok() ? *content : "-") + "|";
    absl::MutexLock lock(&mutex_);
    all_.push_back(text);
    return text.find("bad") == text.npos ? absl::OkStatus() : InvalidArgument("bad");
  }
  // Until the last that came is `text`; false after a minute.
  bool Await(const std::string& text) {
    absl::MutexLock lock(&mutex_);
    const auto is_last = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
      return !all_.empty() && all_.back() == text;
    };
    return mutex_.AwaitWithTimeout(absl::Condition(&is_last), absl::Minutes(1));
  }
  bool Had(const std::string& text) {
    absl::MutexLock lock(&mutex_);
    return std::find(all_.begin(), all_.end(), text) != all_.end();
  }

 private:
  absl::Mutex mutex_;
  std::vector<std::string> all_ ABSL_GUARDED_BY(mutex_);
};

TEST(FileWatchTest, HandsOverWhatChangesAndNothingElse) {
  TempDir dir;
  const std::string a = dir.path() + "/a";
  const std::string b = dir.path() + "/b";
  WriteFile(a, "one");
  WriteFile(b, "1");
  Taken taken;
  FileWatch watch({a, b}, FileWatch::Read({a, b}),
                  [&](const FileWatch::Contents& contents) { return taken.Take(contents); });
  WriteFile(b, "2");
  EXPECT_TRUE(taken.Await("one|2|"));
  EXPECT_FALSE(taken.Had("one|1|")) << "what was there at first is known already";
  WriteFile(a, "bad");
  EXPECT_TRUE(taken.Await("bad|2|"));
  ASSERT_EQ(unlink(a.c_str()), 0);
  EXPECT_TRUE(taken.Await("-|2|"));
  // As a link that points elsewhere.
  WriteFile(dir.path() + "/new", "three");
  ASSERT_EQ(symlink((dir.path() + "/new").c_str(), a.c_str()), 0);
  EXPECT_TRUE(taken.Await("three|2|"));
}

TEST(FileWatchTest, AFileThatCannotBeReadIsAnError) {
  TempDir dir;
  const FileWatch::Contents contents = FileWatch::Read({dir.path(), dir.path() + "/none"});
  ASSERT_EQ(contents.size(), 2u);
  EXPECT_FALSE(contents[0].ok());
  EXPECT_FALSE(contents[1].ok());
}

}  // namespace
}  // namespace tandem
