#include "cli/terminal.h"

#include <cstdlib>
#include <optional>
#include <pty.h>
#include <string>
#include <unistd.h>

#include "gtest/gtest.h"

namespace tandem::cli {
namespace {

// A variable of the environment for the time of a test.
class Variable {
 public:
  explicit Variable(const char* name) : name_(name) {
    if (const char* value = std::getenv(name)) before_ = value;
  }
  ~Variable() { Set(before_); }
  void Set(const std::optional<std::string>& value) const {
    if (value.has_value()) {
      setenv(name_, value->c_str(), 1);
    } else {
      unsetenv(name_);
    }
  }

 private:
  const char* const name_;
  std::optional<std::string> before_;
};

TEST(WantsColour, OnATerminalThatHasThemUnlessNoColorIsSet) {
  int terminal = -1, other_end = -1, pipe_ends[2] = {-1, -1};
  ASSERT_EQ(openpty(&other_end, &terminal, nullptr, nullptr, nullptr), 0);
  ASSERT_EQ(pipe(pipe_ends), 0);
  const Variable no_color("NO_COLOR"), term("TERM");
  no_color.Set(std::nullopt);
  term.Set("xterm-256color");
  EXPECT_TRUE(WantsColour(terminal));
  EXPECT_FALSE(WantsColour(pipe_ends[1]));
  no_color.Set("");  // no-color.org: present and not empty
  EXPECT_TRUE(WantsColour(terminal));
  for (const char* value : {"1", "0", "no"}) {
    no_color.Set(value);
    EXPECT_FALSE(WantsColour(terminal)) << value;
  }
  no_color.Set(std::nullopt);
  term.Set("dumb");
  EXPECT_FALSE(WantsColour(terminal));
  for (const int fd : {terminal, other_end, pipe_ends[0], pipe_ends[1]}) close(fd);
}

TEST(Coloured, IsTheTextItselfWhereColoursAreNotWanted) {
  EXPECT_EQ(Coloured(Colour::kRed, "bad", true), "\033[31mbad\033[0m");
  EXPECT_EQ(Coloured(Colour::kRed, "bad", false), "bad");
  EXPECT_EQ(Coloured(Colour::kNone, "good", true), "good");
}

}  // namespace
}  // namespace tandem::cli
