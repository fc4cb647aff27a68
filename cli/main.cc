// The `tandem` command: finds the subcommand and runs it.
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fcntl.h>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "fmt/format.h"
#include "spdlog/sinks/stdout_sinks.h"
#include "spdlog/spdlog.h"

#include "cli/command.h"
#include "common/base/locks.h"
#include "common/base/nearest_name.h"
#include "common/config/foreign_flags.h"

namespace tandem::cli {
namespace {

void PrintHelp(FILE* out) {
  fmt::print(out, "Usage: tandem COMMAND [flags]\n\n");
  for (const Command& command : Commands()) {
    fmt::print(out, "  {:<12}{}\n", command.name, command.summary);
  }
  fmt::print(out, "  {:<12}{}\n\n", "help", "print this");
  fmt::print(out,
             "tandem COMMAND -h lists the flags of a command. Each can be set in the\n"
             "environment and in a YAML file (--config) too. `tandem help coming-from`\n"
             "says what flags of vLLM, TGI and llama.cpp are called here.\n");
}

// `tandem help coming-from`.
void PrintForeignFlags() {
  fmt::print("Flags of vLLM, TGI and llama.cpp, and what to do here instead:\n\n");
  for (const auto& [name, hint] : ForeignFlagHints()) fmt::print("  {}\n      {}\n", name, hint);
}

int Main(int argc, char** argv) {
  if (argc < 2) {
    PrintHelp(stderr);
    return kExitUsage;
  }
  const std::string name = argv[1];
  if (name == "help" || name == "--help" || name == "-h") {
    if (argc == 2) {
      PrintHelp(stdout);
      return kExitOk;
    }
    if (argv[2] == std::string("coming-from")) {
      PrintForeignFlags();
      return kExitOk;
    }
    std::string help[] = {argv[0], argv[2], "--help"};
    char* forwarded[] = {help[0].data(), help[1].data(), help[2].data()};
    if (help[1] != "help" && help[1] != "--help" && help[1] != "-h") return Main(3, forwarded);
    PrintHelp(stdout);
    return kExitOk;
  }
  if (name == "--version" || name == "-V") return RunVersion({});
  std::vector<std::string> names = {"help"};
  const std::string wanted = name == "serve" ? "up" : name;  // as vLLM calls it
  for (const Command& command : Commands()) {
    if (wanted == command.name) return command.run(Arguments(argv + 2, argv + argc));
    names.push_back(command.name);
  }
  const auto nearest = NearestName(name, names);
  fmt::print(
      stderr, "tandem: unknown command '{}'{}\n", name,
      nearest ? fmt::format("; did you mean {}?", *nearest) : "; tandem help lists them all");
  return kExitUsage;
}

// What is opened later must not take the place of a standard stream that the caller closed.
void FillStandardStreams() {
  for (int fd = 0; fd <= 2; ++fd) {
    if (fcntl(fd, F_GETFD) < 0) open("/dev/null", O_RDWR);
  }
}

// What commands share with servers logs, by default to stdout, where a command's answer goes.
void KeepLogOutOfAnswers() {
  auto logger = spdlog::stderr_logger_mt("tandem");
  logger->set_level(spdlog::level::warn);
  spdlog::set_default_logger(std::move(logger));
}

// A command whose output did not arrive has failed.
int CheckOutput(int exit_code) {
  if (std::fflush(stdout) == 0 && std::ferror(stdout) == 0) return exit_code;
  std::fprintf(stderr, "tandem: cannot write to stdout: %s\n", std::strerror(errno));
  return exit_code == kExitOk ? kExitFailed : exit_code;
}

}  // namespace
}  // namespace tandem::cli

int main(int argc, char** argv) {
  tandem::WatchNoLockOrders();
  tandem::cli::FillStandardStreams();
  tandem::cli::KeepLogOutOfAnswers();
  try {
    return tandem::cli::CheckOutput(tandem::cli::Main(argc, argv));
  } catch (const std::system_error& error) {  // fmt's, where a stream is full or its reader gone
    std::fprintf(stderr, "tandem: %s\n", error.what());
    return tandem::cli::kExitFailed;
  }
}
