#include "cli/chat_history.h"

#include <filesystem>
#include <sys/stat.h>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "common/base/file.h"

namespace tandem::cli {
namespace {

using testing::ElementsAre;

// A folder that is not there yet.
std::string Fresh(const std::string& name) {
  std::string path = testing::TempDir() + "/" + name;
  std::filesystem::remove_all(path);
  return path;
}

TEST(ChatHistory, KeepsMessagesOfSeveralLinesForThisUserAlone) {
  const std::string path = Fresh("history") + "/state/tandem/chat_history";
  const ChatHistory history(path);
  EXPECT_THAT(history.Load(), ElementsAre());
  history.Append("one");
  history.Append("two\nlines and a \\n");
  history.Append(std::string(ChatHistory::kMaxBytes + 1, 'x'));
  EXPECT_THAT(history.Load(), ElementsAre("one", "two\nlines and a \\n"));
  struct stat info {};
  ASSERT_EQ(stat(path.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0600u);
}

TEST(ChatHistory, StaysBounded) {
  const std::string path = Fresh("long_history") + "/tandem/chat_history";
  const ChatHistory history(path);
  const size_t many = 2 * ChatHistory::kMaxMessages + 1;
  for (size_t i = 0; i < many; ++i) history.Append(std::to_string(i));
  const std::vector<std::string> kept = history.Load();
  ASSERT_EQ(kept.size(), ChatHistory::kMaxMessages);
  EXPECT_EQ(kept.back(), std::to_string(many - 1));
  EXPECT_LT(ReadFile(path).value().size(), 6 * ChatHistory::kMaxMessages);
}

TEST(ChatHistory, WithoutAPlaceNothingIsKept) {
  const ChatHistory history("");
  history.Append("one");
  EXPECT_THAT(history.Load(), ElementsAre());
}

}  // namespace
}  // namespace tandem::cli
