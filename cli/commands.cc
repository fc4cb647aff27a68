// The table of subcommands.
#include <array>

#include "cli/command.h"
#include "cli/key.h"

namespace tandem::cli {

std::span<const Command> Commands() {
  static constexpr std::array<Command, 16> kCommands = {{
      {"up", "start a cluster on this machine and keep it running; also: serve", RunUp},
      {"chat", "talk with the model", RunChat},
      {"generate", "continue one prompt", RunGenerate},
      {"bench", "measure a running cluster under load", RunBench},
      {"report", "show the latency dashboard's figures as text and as a page", RunReport},
      {"plan", "say how to split some cards between prompts and answers", RunPlan},
      {"status", "show the workers of a running cluster", RunStatus},
      {"health", "say by exit code whether a router or worker takes work", RunHealth},
      {"doctor", "show the links between workers, or what this machine can do", RunDoctor},
      {"drain", "let a worker finish its requests and leave", RunDrain},
      {"undrain", "take a worker in again that was drained to stay out", RunUndrain},
      {"scale", "change how many workers of a role run", RunScale},
      {"key", "make an API key for clients of a router", RunKey},
      {"inspect", "say what a model directory holds and what memory it needs", RunInspect},
      {"completion", "print what makes bash or zsh complete commands and flags", RunCompletion},
      {"version", "print the version, how this was built, and what the machine has", RunVersion},
  }};
  return kCommands;
}

}  // namespace tandem::cli
