// What a user says to `tandem up`.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"

#include "common/config/flags.h"

namespace tandem::cli {

inline constexpr uint64_t kMaxWorkersOfARole = 64;

struct UpFlags {
  std::string model;
  std::string model_dir;  // the same without a flag's name
  std::optional<uint64_t> prefill;
  std::optional<uint64_t> decode;
  uint64_t unified = 0;
  std::string host = "127.0.0.1";
  int port = 8000;
  int internal_port = 0;
  int metrics_port = 0;
  bool metrics_insecure = false;
  std::string metrics_sd_file;
  double start_timeout_s = 600;
  double stop_timeout_s = 45;
  std::string share_weights = "auto";
  bool dry_run = false;
  std::vector<std::string> forwarded;  // flags of `programs`, --name=value
};

// `programs` are those that it starts: their flags are taken too, but for those that it sets
// itself.
void AddUpFlags(FlagSet* parser, const std::vector<FlagTable>& programs, UpFlags* flags);

// Where its processes serve /metrics, which other hosts read only if the user says so.
std::string MetricsHost(const UpFlags& flags);

// Finds the model's directory and fills in the worker counts. INVALID_ARGUMENT names the flag.
absl::Status CompleteUpFlags(UpFlags* flags);

}  // namespace tandem::cli
