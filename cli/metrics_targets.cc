#include "cli/metrics_targets.h"

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <system_error>

#include "nlohmann/json.hpp"

#include "common/base/host_port.h"
#include "common/base/status.h"
#include "common/rpc/worker_process.h"

namespace tandem::cli {

std::string MetricsListen(const std::string& host, int port, int number) {
  return HostPort{host, port == 0 ? 0 : port + number}.ToString();
}

std::string MetricsTargets(const std::vector<std::string>& addresses) {
  nlohmann::json targets = nlohmann::json::array();
  for (const std::string& address : addresses) {
    const absl::StatusOr<std::string> reached = AdvertisedAddress({}, address);
    targets.push_back(reached.ok() ? *reached : address);
  }
  return nlohmann::json::array({{{"targets", targets}}}).dump(2) + "\n";
}

MetricsTargetsFile::~MetricsTargetsFile() {
  if (written_.empty()) return;
  std::error_code ignored;  // somebody else has removed it
  std::filesystem::remove(path_, ignored);
}

absl::Status MetricsTargetsFile::Set(const std::vector<std::string>& addresses) {
  if (path_.empty()) return absl::OkStatus();
  const std::string text = MetricsTargets(addresses);
  if (text == written_) return absl::OkStatus();
  const std::string next = path_ + ".new";
  std::ofstream file(next);
  file << text;
  file.close();
  if (!file) return InvalidArgument("--metrics-sd-file {}: {}", path_, std::strerror(errno));
  std::error_code error;
  std::filesystem::rename(next, path_, error);
  if (error) return InvalidArgument("--metrics-sd-file {}: {}", path_, error.message());
  written_ = text;
  return absl::OkStatus();
}

}  // namespace tandem::cli
