// The README's first commands, run as they stand there, on the port that is the default.
#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <netinet/in.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include <net/if.h>

#include "tests/support/cluster.h"
#include "tests/support/paths.h"

namespace tandem {
namespace {

using testing::HasSubstr;

constexpr int kDefaultPort = 8000;

// A network of its own, where every port is free. False: not allowed here.
bool OwnNetwork() {
  if (unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0 && unshare(CLONE_NEWNET) != 0) return false;
  const int fd = socket(AF_INET, SOCK_DGRAM, 0);
  ifreq request{};
  std::strcpy(request.ifr_name, "lo");
  request.ifr_flags = IFF_UP | IFF_RUNNING;
  const bool up = ioctl(fd, SIOCSIFFLAGS, &request) == 0;
  close(fd);
  return up;
}

bool PortIsFree() {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(kDefaultPort);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  const bool free = connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0;
  close(fd);
  return free;
}

// The lines of the section "A cluster of your own" that call the programs.
std::vector<std::string> Commands() {
  std::ifstream in(SourcePath("README.md"));
  std::vector<std::string> commands;
  bool inside = false;
  for (std::string line; std::getline(in, line);) {
    if (line.starts_with("## ")) inside = line == "## A cluster of your own";
    if (inside && line.find("$bin/tandem ") != std::string::npos) commands.push_back(line);
  }
  return commands;
}

TEST(Readme, TheFirstCommandsAnswerRightAsTheyStandThere) {
  if (!OwnNetwork() && !PortIsFree()) {
    GTEST_SKIP() << "no network of its own to be had, and port 8000 is taken";
  }
  // Where build/release is what was built, and models what is in the tree.
  TempDir dir;
  std::filesystem::create_directories(dir.path() + "/build/release");
  const auto link = [&](const std::string& to, const std::string& name) {
    std::filesystem::create_directory_symlink(std::filesystem::absolute(to),
                                              dir.path() + "/" + name);
  };
  link(BinaryPath(""), "build/release/bin");
  link(SourcePath("models"), "models");
  const std::string begin = "cd " + dir.path() + "\nbin=build/release/bin\n";

  const std::vector<std::string> commands = Commands();
  ASSERT_GE(commands.size(), 6u);
  ASSERT_THAT(commands.front(), HasSubstr("$bin/tandem up "));
  auto up = Process::Spawn({"/bin/bash", "-c", begin + "exec " + commands.front()}, {},
                           dir.path() + "/stderr");
  const auto ready = up->ReadLine(120);
  ASSERT_EQ(ready.value_or("nothing"), "ready 127.0.0.1:8000")
      << ReadWholeFile(dir.path() + "/stderr");
  int answers = 0;
  for (size_t i = 1; i < commands.size(); ++i) {
    const std::string& command = commands[i];
    // These measure and simulate for longer than this shows; they have tests of their own.
    if (command.find("tandem bench") != std::string::npos) continue;
    if (command.find("tandem plan") != std::string::npos) continue;
    const Completed done = RunCommand({"/bin/bash", "-c", begin + command}, 60);
    EXPECT_EQ(done.exit_code, 0) << command << done.err;
    if (command.find("17 + 25") == std::string::npos) continue;
    EXPECT_THAT(done.out, HasSubstr("42")) << command;
    ++answers;
  }
  EXPECT_GE(answers, 2);
  up->Signal(SIGTERM);
  EXPECT_EQ(up->Wait(60), 0) << ReadWholeFile(dir.path() + "/stderr");
}

}  // namespace
}  // namespace tandem
