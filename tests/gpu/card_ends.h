// Both ends of a transfer between pools in a card's memory, in one process or in two.
#pragma once

#include <algorithm>
#include <array>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <cuda_runtime.h>
#include <filesystem>
#include <numeric>
#include <random>
#include <spawn.h>
#include <string>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

#include "absl/strings/escaping.h"
#include "fmt/format.h"
#include "gtest/gtest.h"

#include "tests/gpu/card_pool.h"

extern char** environ;

namespace tandem::kvtransfer {

inline int NumCards() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}
inline bool HaveCard() { return NumCards() > 0; }

// Both ends on cards, on the first unless it is said; `ends` has the same bytes in the host's
// memory.
struct CardEnds {
  explicit CardEnds(const KvLayout& layout, int source_blocks = 60, int target_blocks = 70,
                    const std::string& transport = "auto", int source_card = 0)
      : ends("auto", layout, source_blocks, target_blocks),
        source(ends.source, source_card),
        target(ends.target) {
    ends.sender_options.transports = ends.receiver_options.transports = transport;
    ends.sender_options.region = source.region();
    ends.receiver_options.region = target.region();
    ends.receiver_options.quiet_timeout = absl::Milliseconds(100);
  }
  // Whether every byte of the target's blocks [first, first + count) is `value`.
  bool Holds(int first, int count, std::byte value) {
    target.CopyTo(&ends.target);
    const KvRegion& region = ends.target.region();
    const size_t bytes = static_cast<size_t>(count) * region.layout.BlockLayerBytes();
    for (int layer = 0; layer < region.layout.num_layers; ++layer) {
      const std::byte* from = region.Block(layer, first);
      // All bytes are as the first, and the one before them.
      if (*from != value || std::memcmp(from, from + 1, bytes - 1) != 0) return false;
    }
    return true;
  }

  Ends ends;
  CardPool source;
  CardPool target;
};

// A child process that runs cuda_ipc_writer.
class Writer {
 public:
  // `variables`: NAME=VALUE of its environment, besides this process's.
  Writer(int layout, int blocks, const std::string& transports,
         std::vector<std::string> variables = {}) {
    std::array<int, 2> in, out;
    EXPECT_EQ(pipe(in.data()), 0);
    EXPECT_EQ(pipe(out.data()), 0);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, in[0], STDIN_FILENO);
    posix_spawn_file_actions_adddup2(&actions, out[1], STDOUT_FILENO);
    posix_spawn_file_actions_addclose(&actions, in[1]);
    posix_spawn_file_actions_addclose(&actions, out[0]);
    std::vector<std::string> args = {
        std::filesystem::read_symlink("/proc/self/exe").parent_path() / "cuda_ipc_writer",
        std::to_string(layout), std::to_string(blocks), "7", transports};
    std::vector<char*> argv;
    for (std::string& arg : args) argv.push_back(arg.data());
    argv.push_back(nullptr);
    std::vector<char*> environment;  // of two values of a name the first counts
    for (std::string& variable : variables) environment.push_back(variable.data());
    for (char** entry = environ; *entry != nullptr; ++entry) environment.push_back(*entry);
    environment.push_back(nullptr);
    EXPECT_EQ(
        posix_spawn(&pid_, args[0].c_str(), &actions, nullptr, argv.data(), environment.data()), 0);
    posix_spawn_file_actions_destroy(&actions);
    close(in[0]);
    close(out[1]);
    in_ = in[1];
    out_ = fdopen(out[0], "r");
  }
  ~Writer() {
    close(in_);
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
    fclose(out_);
  }
  Writer(const Writer&) = delete;

  void Ship(const KvSendTarget& target, int source, int pause_us = 0) {
    const std::string line = fmt::format(
        "{} {} {} {} {} {} {} {}\n", target.address, absl::BytesToHexString(target.id.ToBytes()),
        target.epoch, absl::BytesToHexString(target.token), target.target_blocks.size(), source,
        target.target_blocks[0], pause_us);
    EXPECT_EQ(write(in_, line.data(), line.size()), static_cast<ssize_t>(line.size()));
  }
  struct Result {
    std::string transport;
    int code = -1;
    double microseconds = 0;
  };
  Result Await() {
    Result result;
    std::array<char, 32> transport = {};
    if (std::fscanf(out_, "%31s %d %lf", transport.data(), &result.code, &result.microseconds) ==
        3) {
      result.transport = transport.data();
    }
    return result;
  }
  void Signal(int number) { EXPECT_EQ(kill(pid_, number), 0); }
  // Returns once it stands still: a signal alone is only on its way.
  void Stop() {
    Signal(SIGSTOP);
    int status = 0;
    EXPECT_EQ(waitpid(pid_, &status, WUNTRACED), pid_);
    EXPECT_TRUE(WIFSTOPPED(status));
  }

 private:
  pid_t pid_ = -1;
  int in_ = -1;
  FILE* out_ = nullptr;
};

inline std::vector<int32_t> Range(int first, int count) {
  std::vector<int32_t> blocks(static_cast<size_t>(count));
  std::iota(blocks.begin(), blocks.end(), first);
  return blocks;
}

// What scripts/gpu_cluster_check reads.
inline void Figure(const std::string& name, double value) {
  std::printf("FIGURE %s %.4g\n", name.c_str(), value);
}
inline void Figure(const std::string& name, double bytes, double value) {
  Figure(fmt::format("{}_{:.0f}MB", name, bytes / 1e6), value);
}

inline double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

}  // namespace tandem::kvtransfer
