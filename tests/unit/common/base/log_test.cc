// The lines of the log, and who waits for them.
#include "common/base/log.h"

#include <fcntl.h>
#include <string>
#include <thread>
#include <unistd.h>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

#include "common/base/log_limiter.h"
#include "common/base/log_writer.h"

namespace tandem {
namespace {

using ::testing::EndsWith;
using ::testing::StartsWith;

const absl::Time kTime = absl::FromUnixMillis(1'764'370'442'123);

TEST(LogLineTest, TextIsOneLineThatNamesTheProcessOnce) {
  const std::string line =
      LogLine(LogFormat::kText, kTime, "warn", "decode-0", "a\nb\x1b[31m \xe4\xbd\xa0",
              {{"id", "x y"}, {"n", int64_t{3}}, {"ms", 1.23456}, {"worker", "d-1"}, {"e", ""}});
  EXPECT_EQ(line,
            "2025-11-28T22:54:02.123Z warn  decode-0: a\\nb\\x1b[31m \xe4\xbd\xa0 id=\"x y\" n=3 "
            "ms=1.235 worker=d-1 e=\"\"\n");
}

TEST(LogLineTest, JsonIsValidForAnyBytes) {
  std::string all;
  for (int byte = 0; byte < 256; ++byte) all += static_cast<char>(byte);
  for (const std::string& text :
       {all, std::string("\xf0\x9f\x98"), std::string("\xed\xa0\x80"), std::string()}) {
    const std::string line = LogLine(LogFormat::kJson, kTime, "info", text, text,
                                     {{"id", text}, {"n", int64_t{-3}}, {"ms", 1e300}});
    EXPECT_EQ(line.find('\n'), line.size() - 1);
    const auto parsed = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    ASSERT_TRUE(parsed.is_object()) << line;
    EXPECT_EQ(parsed["time"], "2025-11-28T22:54:02.123Z");
    EXPECT_EQ(parsed["level"], "info");
    EXPECT_TRUE(parsed["process"].is_string());
    EXPECT_TRUE(parsed["message"].is_string());
    EXPECT_EQ(parsed["n"], -3);
  }
}

class Pipe {
 public:
  Pipe() { EXPECT_EQ(pipe2(fds_, O_CLOEXEC), 0); }
  ~Pipe() {
    close(fds_[0]);
    CloseEnd();
  }
  int end() const { return fds_[1]; }
  void CloseEnd() {
    if (fds_[1] >= 0) close(fds_[1]);
    fds_[1] = -1;
  }
  // Until everybody has closed the other end.
  std::string ReadAll() const {
    std::string out;
    char buffer[4096];
    ssize_t n = 0;
    while ((n = read(fds_[0], buffer, sizeof(buffer))) > 0)
      out.append(buffer, static_cast<size_t>(n));
    return out;
  }

 private:
  int fds_[2] = {-1, -1};
};

// Far more than a pipe takes, from one thread: if a line waited for the reader, nobody would read.
TEST(LogWriterTest, NobodyWaitsForTheReader) {
  Pipe pipe;
  const std::string line(1000, 'x');
  std::string rest;
  {
    LogWriter writer(pipe.end(), 200'000,
                     [](uint64_t lost) { return "lost " + std::to_string(lost) + "\n"; });
    for (int i = 0; i < 2000; ++i) writer.Write(line + "\n");
    EXPECT_FALSE(writer.Drain(absl::ZeroDuration()));
    std::thread reader([&] { rest = pipe.ReadAll(); });
    EXPECT_TRUE(writer.Drain(absl::Seconds(30)));
    writer.Write("after\n");
    EXPECT_TRUE(writer.Drain(absl::Seconds(30)));
    pipe.CloseEnd();
    reader.join();
  }
  EXPECT_THAT(rest, StartsWith(line + "\n"));
  EXPECT_THAT(rest, EndsWith("after\n"));
  const size_t note = rest.find("lost ");
  ASSERT_NE(note, std::string::npos);
  // Every line is there or counted.
  size_t there = 0, lost = 0;
  for (size_t at = 0; at < rest.size(); at = rest.find('\n', at) + 1) {
    if (rest[at] == 'x') ++there;
    if (rest[at] == 'l') lost += std::stoul(rest.substr(at + 5));
  }
  EXPECT_EQ(there + lost, 2000u);
  EXPECT_GT(lost, 1000u);
}

TEST(LogWriterTest, ItsEndWritesWhatWaits) {
  Pipe pipe;
  {
    LogWriter writer(pipe.end(), 1 << 20, [](uint64_t) { return ""; });
    for (int i = 0; i < 100; ++i) writer.Write(std::to_string(i) + "\n");
  }
  pipe.CloseEnd();
  EXPECT_THAT(pipe.ReadAll(), EndsWith("98\n99\n"));
}

TEST(LogWriterTest, AReaderThatIsGoneEndsNothing) {
  const int nowhere = open("/dev/full", O_WRONLY | O_CLOEXEC);
  ASSERT_GE(nowhere, 0);
  {
    LogWriter writer(nowhere, 1 << 20, [](uint64_t) { return ""; });
    writer.Write("line\n");
    EXPECT_TRUE(writer.Drain(absl::Seconds(30)));
  }
  close(nowhere);
}

TEST(LogLimiterTest, ABurstAndThenSoManyPerSecond) {
  LogLimiter limiter(/*burst=*/3, /*per_second=*/2);
  const absl::Time start = absl::FromUnixSeconds(1000);
  int allowed = 0;
  for (int i = 0; i < 10; ++i) allowed += limiter.AllowAt(start) ? 1 : 0;
  EXPECT_EQ(allowed, 3);
  EXPECT_TRUE(limiter.AllowAt(start + absl::Milliseconds(500)));
  EXPECT_FALSE(limiter.AllowAt(start + absl::Milliseconds(600)));
  EXPECT_EQ(limiter.TakeWithheld(), 8u);
  EXPECT_EQ(limiter.Withheld(), "");
}

}  // namespace
}  // namespace tandem
