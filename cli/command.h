// The subcommands of `tandem`, and what they have in common.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"

#include "common/config/flags.h"

namespace tandem::cli {

inline constexpr int kExitOk = 0;
inline constexpr int kExitFailed = 1;
inline constexpr int kExitUsage = 2;
inline constexpr int kExitKilled = 130;  // what ran was killed, as a second Ctrl-C wished

inline constexpr char kDefaultServer[] = "127.0.0.1:8000";

using Arguments = std::vector<std::string>;

struct Command {
  const char* name;
  const char* summary;
  int (*run)(const Arguments&);
};
// In the order of the help.
std::span<const Command> Commands();

// What follows the subcommand's name. Each returns the exit code.
int RunUp(const Arguments& arguments);
int RunChat(const Arguments& arguments);
int RunGenerate(const Arguments& arguments);
int RunBench(const Arguments& arguments);
int RunReport(const Arguments& arguments);
int RunPlan(const Arguments& arguments);
int RunStatus(const Arguments& arguments);
int RunHealth(const Arguments& arguments);
int RunDoctor(const Arguments& arguments);
int RunDrain(const Arguments& arguments);
int RunUndrain(const Arguments& arguments);
int RunScale(const Arguments& arguments);
int RunInspect(const Arguments& arguments);
int RunCompletion(const Arguments& arguments);
int RunVersion(const Arguments& arguments);

// Parses; where that ends the command (--help, a mistake), says so and returns the exit code.
std::optional<int> ParseOrExit(FlagSet* flags, const Arguments& arguments);

// Adds --server, which every command takes from TANDEM_SERVER, else 127.0.0.1:8000.
void AddServerFlag(FlagSet* flags, std::string* server);

// A line on stderr; on a terminal it ends between words.
void Complain(const std::string& text);
// One line for people: "INVALID_ARGUMENT: temperature must be >= 0 (field sampling.temperature)".
std::string DescribeError(const absl::Status& status);
// Prints "tandem COMMAND: error" on stderr and returns kExitFailed. `server` ("" for none) is named
// where it could not be reached.
int Fail(const std::string& command, const absl::Status& status, const std::string& server = "");

}  // namespace tandem::cli
