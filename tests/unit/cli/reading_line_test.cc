#include "cli/reading_line.h"

#include <cstdio>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "simulation/fake_clock.h"

namespace tandem::cli {
namespace {

using testing::EndsWith;
using testing::IsEmpty;

v1::PromptProgress Progress(uint32_t computed, uint32_t total) {
  v1::PromptProgress progress;
  progress.set_computed_tokens(computed);
  progress.set_total_tokens(total);
  return progress;
}

// A line into a file.
class ReadingLineTest : public testing::Test {
 protected:
  ~ReadingLineTest() override { std::fclose(file_); }
  ReadingLine::Options Options(bool terminal, bool colour, int width = 80) const {
    return {.out = file_,
            .terminal = terminal,
            .colour = colour,
            .width = width,
            .line_so_far = "tandem> "};
  }
  // The bytes since the last call.
  std::string Shown() {
    std::fflush(file_);
    std::string text(1 << 12, '\0');
    std::fseek(file_, seen_, SEEK_SET);
    text.resize(std::fread(text.data(), 1, text.size(), file_));
    seen_ += std::ssize(text);
    return text;
  }

  std::FILE* file_ = std::tmpfile();
  long seen_ = 0;
  FakeClock clock_;
};

TEST_F(ReadingLineTest, StandsWhereTheAnswerWillAndGoesBeforeIt) {
  ReadingLine line(Options(true, true), &clock_);
  clock_.Advance(absl::Seconds(1));
  line.Show(Progress(4096, 32000));
  EXPECT_EQ(Shown(), "\r\033[Ktandem> \033[2mreading the prompt: 4,096 of 32,000 tokens\033[0m");
  line.Show(Progress(8192, 32000));
  EXPECT_THAT(Shown(), EndsWith("8,192 of 32,000 tokens\033[0m"));
  line.Clear();
  EXPECT_EQ(Shown(), "\r\033[Ktandem> ");
  line.Clear();
  EXPECT_THAT(Shown(), IsEmpty());
}

TEST_F(ReadingLineTest, AShortPromptShowsNothing) {
  ReadingLine line(Options(true, true), &clock_);
  clock_.Advance(absl::Milliseconds(200));
  line.Show(Progress(0, 32000));
  line.Clear();
  EXPECT_THAT(Shown(), IsEmpty());
}

TEST_F(ReadingLineTest, NoColourMeansNoCodesButThoseThatEraseTheLine) {
  {
    ReadingLine line(Options(true, false), &clock_);
    clock_.Advance(absl::Seconds(1));
    line.Show(Progress(1, 9));
  }
  EXPECT_EQ(Shown(), "\r\033[Ktandem> reading the prompt: 1 of 9 tokens\r\033[Ktandem> ");
}

TEST_F(ReadingLineTest, ShowsNothingInAPipeNorWhereThereIsNoRoom) {
  ReadingLine pipe(Options(false, false), &clock_), narrow(Options(true, true, 40), &clock_);
  EXPECT_FALSE(pipe.wanted());
  clock_.Advance(absl::Seconds(1));
  for (ReadingLine* line : {&pipe, &narrow}) {
    line->Show(Progress(4096, 32000));
    line->Clear();
  }
  EXPECT_THAT(Shown(), IsEmpty());
}

}  // namespace
}  // namespace tandem::cli
