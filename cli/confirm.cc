#include "cli/confirm.h"

#include <iostream>
#include <unistd.h>

#include "fmt/format.h"

#include "cli/terminal.h"

namespace tandem::cli {

bool Confirm(const std::string& command, const std::string& warning, bool force) {
  if (force) return true;
  if (!IsTerminal(STDIN_FILENO) || !IsTerminal(STDERR_FILENO)) {
    fmt::print(stderr, "tandem {}: {}; --force does it all the same\n", command, warning);
    return false;
  }
  fmt::print(stderr, "{}. Go on? [y/N] ", warning);
  std::fflush(stderr);
  std::string answer;
  std::getline(std::cin, answer);
  if (answer == "y" || answer == "Y" || answer == "yes") return true;
  fmt::print(stderr, "tandem {}: nothing was done\n", command);
  return false;
}

}  // namespace tandem::cli
