#include "common/base/model_dir.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <optional>
#include <system_error>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_replace.h"
#include "fmt/ranges.h"

#include "common/base/file.h"
#include "common/base/status.h"

namespace tandem {
namespace {

namespace fs = std::filesystem;

constexpr char kPrefix[] = "models--";

fs::path Environment(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr ? value : "";
}

fs::path HubCache() {
  if (const fs::path cache = Environment("HF_HUB_CACHE"); !cache.empty()) return cache;
  if (const fs::path home = Environment("HF_HOME"); !home.empty()) return home / "hub";
  const fs::path home = Environment("HOME");
  return home.empty() ? fs::path() : home / ".cache/huggingface/hub";
}

// "ORG/NAME" in the cache.
std::optional<fs::path> FindInCache(const std::string& name) {
  const fs::path cache = HubCache();
  std::error_code error;
  if (cache.empty() || std::count(name.begin(), name.end(), '/') != 1) return std::nullopt;
  const fs::path folder = cache / (kPrefix + absl::StrReplaceAll(name, {{"/", "--"}}));
  if (!fs::is_directory(folder, error)) return std::nullopt;
  return folder;
}

absl::StatusOr<fs::path> ChooseSnapshot(const std::string& flag, const fs::path& folder) {
  std::error_code error;
  std::vector<std::string> snapshots;
  for (const auto& entry : fs::directory_iterator(folder / "snapshots", error)) {
    snapshots.push_back(entry.path().filename().string());
  }
  std::sort(snapshots.begin(), snapshots.end());
  if (const auto main = ReadFile((folder / "refs/main").string()); main.ok()) {
    const std::string commit(absl::StripAsciiWhitespace(*main));
    if (std::binary_search(snapshots.begin(), snapshots.end(), commit)) {
      return folder / "snapshots" / commit;
    }
  }
  if (snapshots.size() == 1) return folder / "snapshots" / snapshots.front();
  if (snapshots.empty()) {
    return NotFound("{}: {} has no snapshot; download the model anew", flag, folder.string());
  }
  return InvalidArgument(
      "{}: {} has several snapshots and refs/main names none of them; give one: {}", flag,
      (folder / "snapshots").string(), fmt::join(snapshots, ", "));
}

}  // namespace

absl::Status ResolveModelDir(const std::string& flag, std::string* dir) {
  std::error_code error;
  fs::path folder = *dir;
  if (!fs::exists(folder, error)) {
    const std::optional<fs::path> cached = FindInCache(*dir);
    if (!cached.has_value()) return absl::OkStatus();
    folder = *cached;
  }
  if (!fs::is_directory(folder / "snapshots", error) ||
      FileExists((folder / "config.json").string())) {
    return absl::OkStatus();
  }
  TANDEM_ASSIGN_OR_RETURN(const fs::path snapshot, ChooseSnapshot(flag, folder));
  *dir = snapshot.string();
  return absl::OkStatus();
}

std::string DefaultModelName(const std::string& dir) {
  fs::path path = fs::path(dir).lexically_normal();
  if (!path.has_filename()) path = path.parent_path();
  const fs::path snapshots = path.parent_path();
  const std::string folder = snapshots.parent_path().filename().string();
  if (snapshots.filename() == "snapshots" && folder.starts_with(kPrefix)) {
    return absl::StrReplaceAll(folder.substr(sizeof(kPrefix) - 1), {{"--", "/"}});
  }
  const std::string name = path.filename().string();
  return name.empty() || name == "." || name == ".." ? "model" : name;
}

}  // namespace tandem
