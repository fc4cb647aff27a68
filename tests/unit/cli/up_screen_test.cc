#include "cli/up_screen.h"

#include <memory>
#include <sstream>
#include <unistd.h>
#include <vector>

#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

#include "cli/log_line.h"
#include "common/base/log.h"

namespace tandem::cli {
namespace {

constexpr char kInfo[] = "2026-11-24T16:05:55.969Z info  decode-0: loading";
constexpr char kWarning[] = "2026-11-24T16:05:55.969Z warn  router: slow";
constexpr char kError[] = R"({"time":"x","level":"error","message":"bad"})";

TEST(KindOf, FindsTheLevelInEveryFormat) {
  for (const LogFormat format : {LogFormat::kText, LogFormat::kJson}) {
    const auto kind = [format](const char* level) {
      return KindOf(LogLine(format, absl::UnixEpoch(), level, "decode-0", "an error: was cured"));
    };
    EXPECT_EQ(kind("debug"), LineKind::kRoutine);
    EXPECT_EQ(kind("info"), LineKind::kRoutine);
    EXPECT_EQ(kind("warn"), LineKind::kWarning);
    EXPECT_EQ(kind("error"), LineKind::kError);
  }
  for (const char* bare : {"tandem_router: port in use", "FATAL the loop", "", "{", "7 of 9"}) {
    EXPECT_EQ(KindOf(bare), LineKind::kBare) << bare;
  }
}

TEST(TextOf, LeavesTheHeadOut) {
  for (const LogFormat format : {LogFormat::kText, LogFormat::kJson}) {
    const std::string line =
        LogLine(format, absl::UnixEpoch(), "error", "decode-0", "port: in use");
    EXPECT_EQ(TextOf(line.substr(0, line.size() - 1)), "port: in use");
  }
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

TEST_F(UpScreenTest, WhereProcessesLogJsonEveryLineIsAnObject) {
  UpScreen screen({.out = file_, .json = true});
  screen.SetBar("loading");
  screen.Child("decode-0", kError);
  screen.Child("router", "port \"8000\" in use");
  screen.Say("stopping");
  screen.Say("warning: slow", Colour::kYellow);
  screen.Say("it failed:\nbadly", Colour::kRed);
  std::vector<nlohmann::json> lines;
  std::istringstream in(Shown());
  for (std::string line; std::getline(in, line);) {
    lines.push_back(nlohmann::json::parse(line, nullptr, false));
    ASSERT_TRUE(lines.back().is_object()) << line;
    EXPECT_TRUE(lines.back().contains("time")) << line;
  }
  const auto is = [&](size_t i, const char* process, const char* level, const char* message) {
    EXPECT_EQ(lines[i]["process"], process);
    EXPECT_EQ(lines[i]["level"], level);
    EXPECT_EQ(lines[i]["message"], message);
  };
  ASSERT_EQ(lines.size(), 5u);
  EXPECT_EQ(lines[0]["message"], "bad");  // as the worker wrote it
  is(1, "router", "info", "port \"8000\" in use");
  is(2, "up", "info", "stopping");
  is(3, "up", "warn", "warning: slow");
  is(4, "up", "error", "it failed:\nbadly");
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

TEST_F(UpScreenTest, LongLinesEndBetweenWordsOnATerminal) {
  UpScreen screen({.out = file_, .terminal = true, .width = 24});
  screen.Say("the port is in use there");
  screen.Child("router", kInfo);
  EXPECT_EQ(Shown(),
            "tandem up: the port is\n    in use there\n"
            "2026-11-24T16:05:55.969Z\n    info decode-0:\n    loading\n");
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
