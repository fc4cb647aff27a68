// Transports between processes of one host: writers that are stopped, killed, restarted or of
// another user. What must hold, whatever they do: blocks that were given back are never written
// again.
#include <array>
#include <csignal>
#include <filesystem>
#include <numeric>
#include <poll.h>
#include <spawn.h>
#include <string>
#include <sys/wait.h>
#include <unistd.h>

#include "absl/strings/escaping.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/support/paths.h"
#include "tests/unit/kvtransfer/endpoint_fixture.h"

extern char** environ;

namespace tandem::kvtransfer {
namespace {

constexpr int kNumBlocks = 8;
constexpr std::byte kReused{0x5a};

// A child process that runs kv_shm_writer.
class Writer {
 public:
  Writer(const KvSendTarget& target, int stop_at, const std::string& store,
         const std::string& uid = "") {
    std::array<int, 2> ends;
    EXPECT_EQ(pipe(ends.data()), 0);
    output_ = ends[0];
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
    posix_spawn_file_actions_addclose(&actions, ends[0]);
    const std::string program =
        std::filesystem::read_symlink("/proc/self/exe").parent_path() / "kv_shm_writer";
    std::vector<std::string> args = {program,
                                     target.address,
                                     absl::BytesToHexString(target.id.ToBytes()),
                                     std::to_string(target.epoch),
                                     absl::BytesToHexString(target.token),
                                     target.transport,
                                     std::to_string(target.target_blocks[0]),
                                     std::to_string(kNumBlocks),
                                     std::to_string(stop_at),
                                     store};
    if (!uid.empty()) args.push_back(uid);
    std::vector<char*> argv;
    for (std::string& arg : args) argv.push_back(arg.data());
    argv.push_back(nullptr);
    EXPECT_EQ(posix_spawn(&pid_, program.c_str(), &actions, nullptr, argv.data(), environ), 0);
    posix_spawn_file_actions_destroy(&actions);
    close(ends[1]);
  }
  ~Writer() {
    if (!ended_) {
      kill(pid_, SIGKILL);
      AwaitEnd();
    }
    close(output_);
  }
  Writer(const Writer&) = delete;

  void AwaitStop() {
    int status = 0;
    EXPECT_EQ(waitpid(pid_, &status, WUNTRACED), pid_);
    ended_ = !WIFSTOPPED(status);
    EXPECT_TRUE(WIFSTOPPED(status)) << "ended instead of stopping";
  }
  void Signal(int number) { EXPECT_EQ(kill(pid_, number), 0); }
  // What it printed; empty if it was killed.
  std::string AwaitEnd() {
    int status = 0;
    EXPECT_EQ(waitpid(pid_, &status, 0), pid_);
    ended_ = true;
    std::array<char, 64> text;
    const ssize_t n = read(output_, text.data(), text.size());
    return std::string(text.data(), n > 0 ? static_cast<size_t>(n) : 0);
  }

 private:
  pid_t pid_ = -1;
  int output_ = -1;
  bool ended_ = false;
};

class ShmProcesses : public ::testing::TestWithParam<std::string> {
 protected:
  ShmProcesses() : ends_(GetParam()) {
    blocks_.resize(kNumBlocks);
    std::iota(blocks_.begin(), blocks_.end(), 0);
    ends_.receiver_options.quiet_timeout = absl::Milliseconds(50);
    ends_.target.Fill(std::byte{0xee});
  }
  // Where the writer's pool lies.
  static std::string Store() { return GetParam() == "cuda_ipc" ? "card" : "host"; }
  bool Quiet(uint64_t epoch) const { return ends_.record.Received(id_, epoch).quiet > 0; }
  // Until the connection was given up: then the transfer is quiet, or waits for the writer's end.
  void AwaitQuietOrFenced(uint64_t epoch) const {
    const absl::Time end = absl::Now() + kPatience;
    while (!Quiet(epoch) && ends_.receiver->Counters().fenced_transfers == 0) {
      ASSERT_LT(absl::Now(), end);
      absl::SleepFor(absl::Milliseconds(1));
    }
  }
  void ExpectOnlyReused() const {
    for (const std::byte b : ends_.target.memory()) ASSERT_EQ(b, kReused) << "a late byte landed";
  }

  Ends ends_;
  std::vector<int32_t> blocks_;
  const TransferId id_ = TransferId::Random();
};

INSTANTIATE_TEST_SUITE_P(Transports, ShmProcesses, ::testing::Values("shm", "cuda_ipc", "shm_ring"),
                         [](const auto& info) { return info.param; });

// Those whose sender writes the pool, and the one whose receiver alone does.
class OneSidedProcesses : public ShmProcesses {};
class RingProcesses : public ShmProcesses {};
INSTANTIATE_TEST_SUITE_P(Transports, OneSidedProcesses, ::testing::Values("shm", "cuda_ipc"),
                         [](const auto& info) { return info.param; });
INSTANTIATE_TEST_SUITE_P(Transports, RingProcesses, ::testing::Values("shm_ring"),
                         [](const auto& info) { return info.param; });

TEST_P(ShmProcesses, AnotherProcessWritesThePool) {
  ends_.StartReceiver();
  Writer writer(ends_.Expect(id_, 1, blocks_), /*stop_at=*/-1, Store());
  EXPECT_EQ(writer.AwaitEnd(), GetParam() + " 0\n");
  const Record::Receiver got = ends_.record.AwaitQuiet(id_, 1);
  EXPECT_EQ(got.sealed, 1);
  EXPECT_EQ(got.stats.transport, GetParam());
  for (const int32_t block : blocks_) {
    EXPECT_EQ(ends_.target.BlockBytes(block), std::string(SmallLayout().BlockBytes(), '\xab'));
  }
}

// The fence: a writer that is stopped inside a copy holds its blocks for as long as it is, for it
// will go on with that copy whenever it goes on.
TEST_P(OneSidedProcesses, AStoppedWriterKeepsItsBlocksAndNothingLateLands) {
  ends_.StartReceiver();
  Writer writer(ends_.Expect(id_, 1, blocks_), /*stop_at=*/1, Store());
  writer.AwaitStop();
  ends_.receiver->Cancel(id_, 1);
  AwaitQuietOrFenced(1);
  const bool too_early = Quiet(1);
  EXPECT_FALSE(too_early) << "quiet while the writer may still write";
  if (!too_early) {
    EXPECT_EQ(ends_.receiver->Expect(id_, 2, blocks_, "").status().code(),
              absl::StatusCode::kFailedPrecondition);
    writer.Signal(SIGCONT);
    ends_.record.AwaitQuiet(id_, 1);
  }
  // The blocks are somebody else's from here on.
  ASSERT_OK(ends_.receiver->Expect(id_, 2, blocks_, ""));
  ends_.target.Fill(kReused);
  if (too_early) writer.Signal(SIGCONT);
  writer.AwaitEnd();
  ExpectOnlyReused();
}

// What it goes on with is a ring that nobody reads any more.
TEST_P(RingProcesses, AStoppedWriterHoldsNoBlocksAndNothingLateLands) {
  ends_.StartReceiver();
  Writer writer(ends_.Expect(id_, 1, blocks_), /*stop_at=*/1, Store());
  writer.AwaitStop();
  ends_.receiver->Cancel(id_, 1);
  ends_.record.AwaitQuiet(id_, 1);
  EXPECT_EQ(ends_.receiver->Counters().fenced_transfers, 0);
  ASSERT_OK(ends_.receiver->Expect(id_, 2, blocks_, ""));
  ends_.target.Fill(kReused);
  writer.Signal(SIGCONT);
  EXPECT_NE(writer.AwaitEnd(), "shm_ring 0\n");
  ExpectOnlyReused();
}

TEST_P(ShmProcesses, AWriterKilledInsideACopyIsQuietOnceItsProcessIsGone) {
  ends_.StartReceiver();
  Writer writer(ends_.Expect(id_, 1, blocks_), /*stop_at=*/1, Store());
  writer.AwaitStop();
  writer.Signal(SIGKILL);
  const Record::Receiver got = ends_.record.AwaitQuiet(id_, 1);
  EXPECT_EQ(got.status.code(), absl::StatusCode::kUnavailable);
  ASSERT_OK(ends_.receiver->Expect(id_, 2, blocks_, ""));
  ends_.target.Fill(kReused);
  EXPECT_EQ(writer.AwaitEnd(), "");
  ExpectOnlyReused();
}

TEST_P(ShmProcesses, ARestartedWriterShipsTheNextAttempt) {
  ends_.StartReceiver();
  {
    Writer first(ends_.Expect(id_, 1, blocks_), /*stop_at=*/2, Store());
    first.AwaitStop();
    first.Signal(SIGKILL);
    ends_.record.AwaitQuiet(id_, 1);
  }
  Writer second(ends_.Expect(id_, 2, blocks_), /*stop_at=*/-1, Store());
  EXPECT_EQ(second.AwaitEnd(), GetParam() + " 0\n");
  EXPECT_EQ(ends_.record.AwaitQuiet(id_, 2).sealed, 1);
}

// A stopped writer harms nobody but its own transfers.
TEST_P(ShmProcesses, OthersShipWhileOneIsStopped) {
  ends_.StartReceiver();
  Writer stopped(ends_.Expect(id_, 1, {0, 1, 2, 3, 4, 5, 6, 7}), /*stop_at=*/1, Store());
  stopped.AwaitStop();
  const TransferId other = TransferId::Random();
  Writer writer(ends_.Expect(other, 1, {10, 11, 12, 13, 14, 15, 16, 17}), /*stop_at=*/-1, Store());
  EXPECT_EQ(writer.AwaitEnd(), GetParam() + " 0\n");
  EXPECT_EQ(ends_.record.AwaitQuiet(other, 1).sealed, 1);
  stopped.Signal(SIGCONT);
  EXPECT_EQ(stopped.AwaitEnd(), GetParam() + " 0\n");
  EXPECT_EQ(ends_.record.AwaitQuiet(id_, 1).sealed, 1);
}

TEST_P(ShmProcesses, AProcessOfAnotherUserGetsNoMemoryButTcp) {
  if (geteuid() != 0) GTEST_SKIP() << "only root can start a process of another user";
  ends_.receiver_options.transports = "auto";
  ends_.StartReceiver();
  Writer writer(ends_.Expect(id_, 1, blocks_), /*stop_at=*/-1, Store(), /*uid=*/"65534");
  EXPECT_EQ(writer.AwaitEnd(), "tcp 0\n");
  const Record::Receiver got = ends_.record.AwaitQuiet(id_, 1);
  EXPECT_EQ(got.sealed, 1);
  EXPECT_EQ(got.stats.transport, "tcp");
}

}  // namespace
}  // namespace tandem::kvtransfer
