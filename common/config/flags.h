// Command-line flags and the YAML file of the same names (--config FILE; flags win), over CLI11 and
// yaml-cpp.
//
// Usage:
//   FlagSet flags("tandem_prefill_worker", "Computes prompts and ships their KV blocks.");
//   flags.Add("--block-size", &options.block_size, "KV block size", "tokens");
//   absl::Status status = flags.Parse(argc, argv);
//   if (status.ok() && flags.HelpRequested()) { print flags.Help(), exit 0 }
//
// What is given nowhere else may come from the environment: --max-num-seqs from
// TANDEM_MAX_NUM_SEQS, and the flags of `tandem chat`, whose names mean other things in other
// commands, from TANDEM_CHAT_MODEL and so on. The order is flag, environment, YAML file, default;
// an empty variable counts as none.
//
// An unknown flag or YAML key is an error that suggests the nearest name, or says what to do
// instead of a flag of vLLM's or TGI's; a bad value names the flag, where it came from, the value
// and what is accepted.
//
// Every program also answers --list-flags (in no help text) with its FlagTable as JSON, from which
// shell completion and docs/flags.md are made. Not thread-safe; used at start only.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"

#include "common/config/flag_table.h"

namespace tandem {

class FlagSet {
 public:
  FlagSet(std::string program, std::string description);
  ~FlagSet();

  // Heading in the help of the flags added from here on; --help=NAME shows these alone.
  void Group(const std::string& name);
  // A whole command for the end of the help, perhaps with "  # what for".
  void Example(const std::string& command);

  // `target` holds the default and receives the value. `unit` ("tokens", "ms", "bytes", "") is
  // shown in the help. Booleans take --name, --name=true|false and --no-name. Byte sizes accept
  // suffixes K, M, G, KiB, MiB, GiB; integers in tokens those of ParseCount (32k, 128K).
  void Add(const std::string& name, bool* target, const std::string& help);
  void Add(const std::string& name, int* target, const std::string& help,
           const std::string& unit = "");
  void Add(const std::string& name, uint64_t* target, const std::string& help,
           const std::string& unit = "");
  void Add(const std::string& name, double* target, const std::string& help,
           const std::string& unit = "");
  void Add(const std::string& name, std::string* target, const std::string& help,
           const std::string& unit = "");
  // Left unset unless given.
  void Add(const std::string& name, std::optional<int64_t>* target, const std::string& help,
           const std::string& unit = "");
  void Add(const std::string& name, std::optional<uint64_t>* target, const std::string& help,
           const std::string& unit = "");
  void Add(const std::string& name, std::optional<double>* target, const std::string& help,
           const std::string& unit = "");
  // May be given several times; on the command line only.
  void AddRepeated(const std::string& name, std::vector<std::string>* target,
                   const std::string& help);
  // Takes one or more values at once, and may be repeated: --goodput ttft:500 tpot:50.
  void AddList(const std::string& name, std::vector<std::string>* target, const std::string& help,
               const std::string& unit = "");
  void AddBytes(const std::string& name, int64_t* target, const std::string& help);
  void AddChoice(const std::string& name, std::string* target,
                 const std::vector<std::string>& choices, const std::string& help);
  // Positional argument.
  void AddPositional(const std::string& name, std::string* target, const std::string& help,
                     bool required);
  // Takes the flags of another program, but for those that are ours too: what is given of them goes
  // to `given` as --name=value once its kind is right; ranges are that program's affair (`tandem up
  // ... [worker flags]`).
  void AddForeign(const FlagTable& table, std::vector<std::string>* given);
  // Refuses a flag added before, wherever it is given, and says why; no help shows it.
  void Refuse(const std::string& name, const std::string& why);
  // The variable that sets a flag added before, instead of the one made from its name; "": none.
  void SetEnvironment(const std::string& name, const std::string& variable);
  // Makes the program answer --version with `text`.
  void AnswerVersion(const std::string& text);

  // Understands -h, --help, --help=GROUP, --config and --list-flags besides what was added.
  absl::Status Parse(int argc, const char* const* argv);
  absl::Status Parse(const std::vector<std::string>& args);
  const std::string& program() const;
  // --help, --version or --list-flags was given.
  bool HelpRequested() const;
  // What was asked for: the table as JSON, the version, or help for people, wrapped to the width of
  // the terminal (80 columns where stdout is none).
  std::string Help() const;
  FlagTable Table() const;
  // Names of all flags, for suggestions across programs.
  std::vector<std::string> Names() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace tandem
