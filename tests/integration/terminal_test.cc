// `tandem chat` and `tandem generate` as a person sees them: on a terminal, key by key.
#include <algorithm>
#include <csignal>
#include <filesystem>
#include <regex>
#include <sys/stat.h>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/support/cluster.h"
#include "tests/support/paths.h"
#include "tests/support/pty.h"

namespace tandem {
namespace {

using testing::HasSubstr;
using testing::IsEmpty;
using testing::Not;

constexpr char kCtrlC[] = "\x03";
constexpr char kCtrlD[] = "\x04";
constexpr char kBackspace[] = "\x7f";
constexpr char kUp[] = "\x1b[A";
constexpr char kAltEnter[] = "\x1b\r";
constexpr double kPatience = 60;  // of a busy machine

std::string Pasted(const std::string& text) { return "\x1b[200~" + text + "\x1b[201~"; }

// One cluster for all tests of a suite; each step takes 20 ms, so that answers can be interrupted.
class Terminal : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    ClusterSpec spec;
    spec.model_dir = SourcePath("models/demo");
    spec.worker_flags = {"--num-threads=1", "--kv-cache-memory-bytes=64MiB", "--min-step-ms=20"};
    cluster_ = TestCluster::Start(spec).release();
  }
  static void TearDownTestSuite() {
    delete cluster_;
    cluster_ = nullptr;
  }
  void SetUp() override { ASSERT_NE(cluster_, nullptr); }

  std::unique_ptr<PtyProcess> Start(std::vector<std::string> args, int columns = 80) {
    args.insert(args.begin(), BinaryPath("tandem"));
    args.insert(args.end(), {"--server", cluster_->address()});
    return std::make_unique<PtyProcess>(
        args, std::vector<std::string>{"XDG_STATE_HOME=" + state_.path(), "LC_ALL=C"}, columns);
  }
  // At its first prompt.
  std::unique_ptr<PtyProcess> StartChat(std::vector<std::string> flags = {}, int columns = 80) {
    flags.insert(flags.begin(), "chat");
    auto chat = Start(std::move(flags), columns);
    EXPECT_TRUE(chat->WaitFor("you>", kPatience)) << chat->screen().Text();
    return chat;
  }
  // The answer to `message`, which is typed; at the next prompt.
  static std::string Ask(PtyProcess* chat, const std::string& message) {
    const size_t before = Count(chat->screen().Text(), "you>");
    chat->Type(message + "\r");
    EXPECT_TRUE(chat->WaitFor("you>", static_cast<int>(before) + 1, kPatience))
        << chat->screen().Text();
    const std::string text = chat->screen().Text();
    const size_t answer = text.rfind("tandem> ");
    if (answer == std::string::npos) return "";
    return text.substr(answer + 8, text.rfind("\nyou>") - answer - 8);
  }
  static size_t Count(const std::string& text, const std::string& part) {
    size_t count = 0;
    for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) {
      ++count;
    }
    return count;
  }

  static TestCluster* cluster_;
  TempDir state_;
};

TestCluster* Terminal::cluster_ = nullptr;

TEST_F(Terminal, TheBannerNamesServerAndModel) {
  auto chat = StartChat();
  EXPECT_THAT(chat->screen().Line(0), HasSubstr("demo at " + cluster_->address()));
  EXPECT_THAT(chat->screen().Line(1), testing::StartsWith("you>"));
  EXPECT_TRUE(chat->screen().bracketed_paste());
  chat->Type(kCtrlD);
  EXPECT_EQ(chat->Wait(kPatience), 0);
  EXPECT_TRUE(chat->IsCooked());
  EXPECT_FALSE(chat->screen().bracketed_paste());
  EXPECT_THAT(chat->screen().unknown(), IsEmpty());
}

TEST_F(Terminal, WithoutAServerItSaysSoAtOnce) {
  PtyProcess chat({BinaryPath("tandem"), "chat", "--server", "127.0.0.1:1"},
                  {"XDG_STATE_HOME=" + state_.path()});
  EXPECT_EQ(chat.Wait(kPatience), 1);
  EXPECT_THAT(chat.screen().Text(), HasSubstr("127.0.0.1:1"));
  EXPECT_THAT(chat.screen().Text(), HasSubstr("tandem up"));
  EXPECT_THAT(chat.screen().Text(), Not(HasSubstr("you>")));
  EXPECT_TRUE(chat.IsCooked());
}

TEST_F(Terminal, CtrlCClearsTheLineAndLeavesAtAnEmptyOne) {
  auto chat = StartChat();
  chat->Type("no, not this");
  ASSERT_TRUE(chat->WaitFor("not this", kPatience));
  chat->Type(kCtrlC);
  ASSERT_TRUE(chat->WaitFor("you>", 2, kPatience)) << chat->screen().Text();
  EXPECT_EQ(Ask(chat.get(), "What is 17 + 25?"), "17 + 25 = 42.");
  chat->Type(kCtrlC);
  EXPECT_EQ(chat->Wait(kPatience), 0) << chat->screen().Text();
  EXPECT_THAT(chat->screen().Text(), Not(HasSubstr("tandem> tandem> ")));
  EXPECT_TRUE(chat->IsCooked());
}

TEST_F(Terminal, SignalsAtThePromptEndItAndSendNothing) {
  auto chat = StartChat();
  chat->Type("half a mess");
  ASSERT_TRUE(chat->WaitFor("half a mess", kPatience));
  chat->Signal(SIGTERM);
  EXPECT_EQ(chat->Wait(kPatience), 128 + SIGTERM) << chat->screen().Text();
  EXPECT_THAT(chat->screen().Text(), Not(HasSubstr("tandem> ")));
  EXPECT_TRUE(chat->IsCooked());
}

TEST_F(Terminal, CtrlCStopsAnAnswerWhoseFiguresAreTrue) {
  auto chat = StartChat({"--stats", "--ignore-eos", "--max-tokens", "1000"});
  chat->Type("Hello!\r");
  ASSERT_TRUE(chat->WaitUntil(
      [](const Screen& screen) {
        const size_t answer = screen.Text().find("tandem> ");
        return answer != std::string::npos && screen.Text().size() > answer + 40;
      },
      kPatience))
      << chat->screen().Text();
  chat->Type(kCtrlC);
  ASSERT_TRUE(chat->WaitFor("you>", 2, kPatience)) << chat->screen().Text();
  std::string text = chat->screen().Text();
  std::replace(text.begin(), text.end(), '\n', ' ');  // the line may end within the figures
  std::smatch figures;
  const std::regex pattern(
      R"(\[stopped: (\d+) prompt tokens.*, (\d+) generated, TTFT ([\d.]+) ms, ([\d.]+) tok/s)");
  ASSERT_TRUE(std::regex_search(text, figures, pattern)) << text;
  EXPECT_GT(std::stoi(figures[1]), 10);
  EXPECT_GT(std::stoi(figures[2]), 1);
  EXPECT_GT(std::stod(figures[3]), 0);
  EXPECT_GT(std::stod(figures[4]), 0);
  EXPECT_LT(std::stod(figures[4]), 51) << "a step takes 20 ms at least";
  EXPECT_THAT(text, Not(HasSubstr("- -> -")));
}

TEST_F(Terminal, TypingWhileAnAnswerStreamsWaitsForThePrompt) {
  auto chat = StartChat();
  chat->Type("What is 17 + 25?\r");
  ASSERT_TRUE(chat->WaitFor("tandem> 17", kPatience)) << chat->screen().Text();
  chat->Type("What is 2 + 2?");
  ASSERT_TRUE(chat->WaitFor("you> What is 2 + 2?", kPatience)) << chat->screen().Text();
  EXPECT_THAT(chat->screen().Text(), HasSubstr("tandem> 17 + 25 = 42.\n"));
  EXPECT_EQ(Ask(chat.get(), ""), "2 + 2 = 4.");
}

TEST_F(Terminal, BackspaceOverWideCharactersShowsWhatIsSent) {
  auto chat = StartChat();
  chat->Type("Repeat: 你好世界朋友");
  ASSERT_TRUE(chat->WaitFor("朋友", kPatience));
  chat->Type(std::string(kBackspace) + kBackspace);
  ASSERT_TRUE(chat->WaitUntil(
      [](const Screen& screen) { return screen.Line(1) == "you> Repeat: 你好世界"; }, kPatience))
      << chat->screen().Text();
  EXPECT_EQ(Ask(chat.get(), ""), "Again: 你好世界");
}

TEST_F(Terminal, ArrowKeysEditAndBringBackWhatWasTypedBefore) {
  {
    auto chat = StartChat();
    chat->Type("What is 7 + 25?\x1b[D\x1b[D\x1b[D\x1b[D\x1b[D\x1b[D\x1b[D");
    EXPECT_EQ(Ask(chat.get(), "1"), "17 + 25 = 42.");
    chat->Type(kCtrlD);
    ASSERT_EQ(chat->Wait(kPatience), 0);
  }
  auto chat = StartChat();
  EXPECT_EQ(Ask(chat.get(), kUp), "17 + 25 = 42.") << "history outlives the program";
  struct stat info {};
  ASSERT_EQ(stat((state_.path() + "/tandem/chat_history").c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0600u);
}

// How many tokens the router says a message has that is too long.
int TokensOf(const std::string& text) {
  std::smatch match;
  static const std::regex pattern(R"(messages\s+has\s+(\d+)\s+tokens)");
  return std::regex_search(text, match, pattern) ? std::stoi(match[1]) : -1;
}

TEST_F(Terminal, PastedTextOfAnyLengthArrivesWhole) {
  for (const size_t bytes : {7'101u, 20'000u}) {
    std::string line;
    for (int i = 0; line.size() < bytes; ++i) line += "word " + std::to_string(i) + " ";
    line.resize(bytes);
    const Completed piped = RunCommand(
        {BinaryPath("tandem"), "chat", "--server", cluster_->address()}, kPatience, line + "\n");
    const int tokens = TokensOf(piped.err);
    ASSERT_GT(tokens, 2048) << piped.err;
    auto chat = StartChat();
    chat->Type(Pasted(line) + "\r");
    ASSERT_TRUE(chat->WaitUntil([](const Screen& screen) { return TokensOf(screen.Text()) > 0; },
                                kPatience))
        << chat->screen().Text().substr(0, 2000);
    EXPECT_EQ(TokensOf(chat->screen().Text()), tokens);
  }
}

TEST_F(Terminal, SeveralLinesAreOneMessage) {
  // One turn each: a second one would say "tandem> " again.
  auto chat = StartChat();
  chat->Type(Pasted("What is\r17 + 25?\r"));
  Ask(chat.get(), "");
  EXPECT_EQ(Count(chat->screen().Text(), "tandem> "), 1u) << chat->screen().Text();
  Ask(chat.get(), std::string("What is") + kAltEnter + "17 + 25?");
  EXPECT_EQ(Count(chat->screen().Text(), "tandem> "), 2u) << chat->screen().Text();
  chat->Type("\"\"\"What is\r");
  ASSERT_TRUE(chat->WaitFor("...>", kPatience)) << chat->screen().Text();
  Ask(chat.get(), "17 + 25?\"\"\"");
  EXPECT_EQ(Count(chat->screen().Text(), "tandem> "), 3u) << chat->screen().Text();
}

TEST_F(Terminal, CommandsThatItDoesNotKnowAreNamed) {
  auto chat = StartChat();
  Ask(chat.get(), "/foo");
  EXPECT_THAT(chat->screen().Text(), HasSubstr("unknown command /foo; /help lists them"));
  Ask(chat.get(), "/help");
  EXPECT_THAT(chat->screen().Text(), HasSubstr("/reset"));
  EXPECT_THAT(chat->screen().Text(), Not(HasSubstr("tandem> "))) << "nothing was sent";
}

TEST_F(Terminal, AFullContextOffersToForgetTheOldestTurns) {
  std::string much = "Remember";
  for (int i = 0; i < 120; ++i) much += " " + std::to_string(1000 + i);
  auto chat = StartChat({"--max-tokens", "30"}, 120);
  int turns = 0;
  // Numbers are a token a digit: three or four of these fill 2,048 tokens.
  while (turns < 8 && Count(chat->screen().Text(), "[Y/n]") == 0) {
    const size_t prompts = Count(chat->screen().Text(), "you>");
    chat->Type(Pasted(much) + "\r");
    ASSERT_TRUE(chat->WaitUntil(
        [&](const Screen& screen) {
          return Count(screen.Text(), "you>") > prompts || Count(screen.Text(), "[Y/n]") > 0;
        },
        kPatience))
        << chat->screen().Text();
    ++turns;
  }
  ASSERT_GT(turns, 1);
  EXPECT_THAT(chat->screen().Text(), HasSubstr("Forget the oldest question and its answer?"));
  const size_t answers = Count(chat->screen().Text(), "tandem>");
  chat->Type("\r");
  ASSERT_TRUE(chat->WaitFor("you>", turns + 1, kPatience)) << chat->screen().Text();
  EXPECT_GT(Count(chat->screen().Text(), "tandem>"), answers) << "asked again";
}

// Several prompts, until one is caught being read: a busy machine may draw line and answer at once.
TEST_F(Terminal, ALongPromptIsSeenBeingReadUntilItsAnswerComes) {
  ClusterSpec spec;
  spec.model_dir = SourcePath("models/demo");
  spec.prefill = spec.decode = 0;
  spec.unified = 1;
  spec.worker_flags = {"--num-threads=1", "--kv-cache-memory-bytes=64MiB", "--min-step-ms=50",
                       "--max-num-batched-tokens=16", "--max-num-seqs=8"};
  const auto slow = TestCluster::Start(spec);
  ASSERT_NE(slow, nullptr);
  PtyProcess chat({BinaryPath("tandem"), "chat", "--max-tokens=5", "--server", slow->address()},
                  {"XDG_STATE_HOME=" + state_.path(), "LC_ALL=C"});
  ASSERT_TRUE(chat.WaitFor("you>", kPatience)) << chat.screen().Text();
  const std::regex reading("tandem> reading the prompt: [0-9,]+ of [0-9,]+ tokens\n*$");
  bool seen = false;
  for (int turn = 1; !seen && turn <= 4; ++turn) {
    std::string numbers = "Remember";
    for (int i = 0; i < 75; ++i) numbers += " " + std::to_string(1000 * turn + i);
    chat.Type(Pasted(numbers) + "\r");
    ASSERT_TRUE(chat.WaitUntil(
        [&](const Screen& screen) {
          seen = std::regex_search(screen.Text(), reading);
          return seen || Count(screen.Text(), "you>") > static_cast<size_t>(turn);
        },
        kPatience))
        << chat.screen().Text();
    ASSERT_TRUE(chat.WaitFor("you>", turn + 1, kPatience)) << chat.screen().Text();
    EXPECT_THAT(chat.screen().Text(), Not(HasSubstr("reading the prompt")));
  }
  EXPECT_TRUE(seen);
  EXPECT_THAT(chat.screen().unknown(), IsEmpty());
}

TEST_F(Terminal, GenerateThatIsInterruptedEndsTheLineAndSaysNoMore) {
  auto generate = Start({"generate", "--prompt", "Hello", "--ignore-eos", "--max-tokens", "1000"});
  ASSERT_TRUE(generate->WaitUntil([](const Screen& screen) { return screen.Text().size() > 20; },
                                  kPatience));
  generate->Type(kCtrlC);
  EXPECT_EQ(generate->Wait(kPatience), 130) << generate->screen().Text();
  EXPECT_THAT(generate->screen().Text(), Not(HasSubstr("CANCELLED")));
  EXPECT_EQ(generate->screen().cursor_column(), 0);
}

// What went wrong was wiped away with the last screen.
TEST_F(Terminal, AWatchThatReachesNobodySaysSoBetweenWords) {
  PtyProcess watch({BinaryPath("tandem"), "status", "--watch", "--server", "127.0.0.1:1",
                    "--internal", "127.0.0.1:1"},
                   {"TANDEM_CLUSTER_SECRET=none"});
  EXPECT_TRUE(watch.WaitFor("nothing answers at 127.0.0.1:1 (Connection refused); start a\ncluster",
                            kPatience))
      << watch.screen().Text();
}

TEST_F(Terminal, CtrlCEndsAWatchAndIsNotLeftOnTheLine) {
  PtyProcess watch({BinaryPath("tandem"), "status", "--watch", "--server", "127.0.0.1:1",
                    "--internal", "127.0.0.1:1"},
                   {"TANDEM_CLUSTER_SECRET=none"});
  ASSERT_TRUE(watch.WaitFor("Ctrl-C ends", kPatience)) << watch.screen().Text();
  watch.Type(kCtrlC);
  EXPECT_EQ(watch.Wait(kPatience), 128 + SIGINT);
  EXPECT_THAT(watch.screen().Text(), Not(HasSubstr("^C")));
  EXPECT_EQ(watch.screen().cursor_column(), 0);
}

}  // namespace
}  // namespace tandem
