#include "cli/up_screen.h"

#include <memory>
#include <unistd.h>

#include "gtest/gtest.h"

#include "cli/log_line.h"

namespace tandem::cli {
namespace {

constexpr char kInfo[] = "16:05:56.016 decode-0 info loading";
constexpr char kWarning[] = "2026-11-24T16:05:55.969 W router: slow";
constexpr char kError[] = R"({"time":"x","level":"error","message":"bad"})";

TEST(KindOf, FindsTheLevelInEveryFormat) {
  EXPECT_EQ(KindOf(kInfo), LineKind::kRoutine);
  EXPECT_EQ(KindOf("2026-11-24T16:05:55.969 I router: up"), LineKind::kRoutine);
  EXPECT_EQ(KindOf("2026-11-24T16:05:55.969 info  decode-0 an error was cured"),
            LineKind::kRoutine);
  EXPECT_EQ(KindOf(R"({"time":"x", "level": "info", "message":"error"})"), LineKind::kRoutine);
  EXPECT_EQ(KindOf(kWarning), LineKind::kWarning);
  EXPECT_EQ(KindOf("16:05:56.016 decode-0 warning lost router"), LineKind::kWarning);
  EXPECT_EQ(KindOf(kError), LineKind::kError);
  EXPECT_EQ(KindOf("16:05:56.016 decode-0 critical done"), LineKind::kError);
  for (const char* bare : {"tandem_router: port in use", "FATAL the loop", "", "{", "7 of 9"}) {
    EXPECT_EQ(KindOf(bare), LineKind::kBare) << bare;
  }
}

TEST(TextOf, LeavesTheHeadOut) {
  EXPECT_EQ(TextOf("2026-11-28T22:54:02.123Z error router: port: in use"), "port: in use");
  EXPECT_EQ(TextOf("16:05:56.016 decode-0 error out of blocks"), "out of blocks");
  EXPECT_EQ(TextOf(kError), "bad");
  EXPECT_EQ(TextOf("tandem_router: port in use"), "tandem_router: port in use");
  EXPECT_EQ(TextOf(R"({"level": 3})"), R"({"level": 3})");
}

// A screen into a file.
class UpScreenTest : public testing::Test {
 protected:
  ~UpScreenTest() override { std::fclose(file_); }
  UpScreen::Options Options(bool terminal, bool colour) const {
    return {.out = file_, .terminal = terminal, .colour = colour};
  }
  std::string Shown() {
    std::fflush(file_);
    std::rewind(file_);
    std::string text(1 << 16, '\0');
    text.resize(std::fread(text.data(), 1, text.size(), file_));
    return text;
  }

  std::FILE* file_ = std::tmpfile();
};

TEST_F(UpScreenTest, APipeGetsEveryLineAndNoControlCodes) {
  UpScreen screen(Options(false, false));
  screen.SetQuiet(true);
  screen.SetBar("loading");
  screen.Child("decode-0", kInfo);
  screen.Child("router", kWarning);
  screen.Child("router", "port in use");
  screen.Say("it failed", Colour::kRed);
  EXPECT_EQ(Shown(), std::string(kInfo) + "\n" + kWarning +
                         "\nrouter | port in use\ntandem up: it failed\n");
}

TEST_F(UpScreenTest, ATerminalGetsColoursAndIsSparedRoutine) {
  UpScreen screen(Options(true, true));
  screen.SetQuiet(true);
  screen.Child("decode-0", kInfo);
  screen.Child("router", kWarning);
  screen.Child("router", kError);
  screen.SetQuiet(false);
  screen.Child("decode-0", kInfo);
  EXPECT_EQ(Shown(), std::string("\033[33m") + kWarning + "\033[0m\n\033[31m" + kError +
                         "\033[0m\n" + kInfo + "\n");
}

TEST_F(UpScreenTest, ChildrenCanBeMuted) {
  UpScreen screen(Options(false, false));
  screen.MuteChildren();
  screen.Child("router", kError);
  screen.Say("why");
  EXPECT_EQ(Shown(), "tandem up: why\n");
}

TEST_F(UpScreenTest, TheBarStaysBelowTheLines) {
  {
    UpScreen screen(Options(true, false));
    screen.SetBar("10 %");
    screen.SetBar("10 %");
    screen.Say("hello");
  }
  EXPECT_EQ(Shown(), "\r\033[K10 %\r\033[Ktandem up: hello\n10 %\r\033[K");
}

TEST(Terminal, NoColourWhereItIsNotWanted) {
  EXPECT_EQ(Coloured(Colour::kRed, "x", false), "x");
  EXPECT_EQ(Coloured(Colour::kNone, "x", true), "x");
  EXPECT_EQ(Coloured(Colour::kYellow, "x", true), "\033[33mx\033[0m");
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  EXPECT_FALSE(WantsColour(ends[1]));
  EXPECT_EQ(TerminalWidth(ends[1]), 80);
  close(ends[0]);
  close(ends[1]);
}

}  // namespace
}  // namespace tandem::cli
