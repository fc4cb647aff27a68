// Command-line flags and the YAML file of the same names (--config FILE; flags win), over CLI11 and
// yaml-cpp.
//
// Usage:
//   FlagSet flags("tandem_prefill_worker", "Computes prompts and ships their KV blocks.");
//   flags.Add("--block-size", &options.block_size, "KV block size", "tokens");
//   absl::Status status = flags.Parse(argc, argv);
//   if (status.ok() && flags.HelpRequested()) { print flags.Help(), exit 0 }
//
// An unknown flag or YAML key is an error that suggests the nearest name; a bad value names the
// flag, the value and what is accepted.
//
// Every program also answers --list-flags (in no help text) with its table of flags as JSON, from
// which `tandem up` learns who takes which flag: the program that will be started is the only one
// that knows its own flags for certain. Not thread-safe; used at start only.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"

namespace tandem {

class FlagSet {
 public:
  FlagSet(std::string program, std::string description);
  ~FlagSet();

  // `target` holds the default and receives the value. `unit` ("tokens", "ms", "bytes", "") is
  // shown in the help. Booleans take --name, --name=true|false and --no-name. Byte sizes accept
  // suffixes K, M, G, KiB, MiB, GiB.
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
  // What is not ours is collected here instead of refused (`tandem up ... [worker flags]`).
  void CollectUnknown(std::vector<std::string>* target);

  // Understands --help, --config and --list-flags besides what was added.
  absl::Status Parse(int argc, const char* const* argv);
  absl::Status Parse(const std::vector<std::string>& args);
  const std::string& program() const;
  // --help or --list-flags was given.
  bool HelpRequested() const;
  // After --list-flags {"program": ..., "flags": [{"name", "boolean", "unit", "default", "help"},
  // ...]}; otherwise text for people.
  std::string Help() const;
  // Names of all flags, for suggestions across programs.
  std::vector<std::string> Names() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace tandem
