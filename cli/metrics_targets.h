// Where the processes of `tandem up` serve /metrics, and the file that tells Prometheus
// (file_sd_configs). Fixed ports need no file; the file needs no fixed ports.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"

namespace tandem::cli {

// Of the process with that number (the router's is 0): HOST:PORT+number; with port 0 any.
std::string MetricsListen(const std::string& host, int port, int number);

// The content of the file for processes that listen at `addresses`, HOST:PORT as they announced
// them; of one that was bound to all interfaces, the machine's name. Without labels: role, worker
// and model_name stand in the metrics themselves.
std::string MetricsTargets(const std::vector<std::string>& addresses);

// Keeps a file at what was last said, so that a reader never sees a half of it. Removes it at the
// end. Not thread-safe.
class MetricsTargetsFile {
 public:
  // "": none.
  explicit MetricsTargetsFile(std::string path) : path_(std::move(path)) {}
  ~MetricsTargetsFile();
  MetricsTargetsFile(const MetricsTargetsFile&) = delete;
  MetricsTargetsFile& operator=(const MetricsTargetsFile&) = delete;

  // Writes only what has changed. Errors name the file.
  absl::Status Set(const std::vector<std::string>& addresses);

 private:
  const std::string path_;
  std::string written_;
};

}  // namespace tandem::cli
