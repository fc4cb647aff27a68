#include "cli/cluster_note.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <filesystem>
#include <sstream>
#include <sys/stat.h>
#include <unistd.h>

#include "common/base/file.h"
#include "common/base/host_port.h"
#include "common/base/status.h"

namespace tandem::cli {
namespace {

std::string Directory() {
  const char* runtime = std::getenv("XDG_RUNTIME_DIR");
  if (runtime != nullptr && *runtime != '\0') return std::string(runtime) + "/tandem";
  return fmt::format("/tmp/tandem-{}", getuid());
}

// A directory of another's making (in /tmp anyone can make one) is not trusted, nor is one that
// others may write.
absl::Status CheckDirectory() {
  struct stat info = {};
  if (lstat(Directory().c_str(), &info) != 0) return NotFound("{}: not there", Directory());
  if (!S_ISDIR(info.st_mode) || info.st_uid != getuid() || (info.st_mode & 077) != 0) {
    return PermissionDenied("{} must be a directory that only this user can enter", Directory());
  }
  return absl::OkStatus();
}

}  // namespace

std::string ClusterNotePath(const std::string& server) {
  std::string name = server;
  for (char& c : name) {
    if (c == '/') c = '_';
  }
  return Directory() + "/" + name;
}

std::vector<std::string> ListClusterNotes() {
  std::vector<std::string> servers;
  if (!CheckDirectory().ok()) return servers;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(Directory(), error)) {
    const std::string name = entry.path().filename().string();
    if (entry.is_regular_file(error) && ParseHostPort(name).ok()) servers.push_back(name);
  }
  std::sort(servers.begin(), servers.end());
  return servers;
}

absl::Status WriteClusterNote(const std::string& server, const ClusterNote& note) {
  mkdir(Directory().c_str(), 0700);
  TANDEM_RETURN_IF_ERROR(CheckDirectory());
  const std::string path = ClusterNotePath(server);
  const std::string fresh = fmt::format("{}.{}", path, getpid());
  const int fd = open(fresh.c_str(), O_CREAT | O_TRUNC | O_WRONLY | O_NOFOLLOW | O_CLOEXEC, 0600);
  if (fd < 0) return Unavailable("{}: {}", fresh, std::strerror(errno));
  const std::string text = note.internal_address + "\n" + note.secret + "\n";
  const bool written = write(fd, text.data(), text.size()) == static_cast<ssize_t>(text.size());
  close(fd);
  if (!written || std::rename(fresh.c_str(), path.c_str()) != 0) {
    const std::string why = std::strerror(errno);
    unlink(fresh.c_str());
    return Unavailable("{}: {}", path, why);
  }
  return absl::OkStatus();
}

absl::StatusOr<ClusterNote> ReadClusterNote(const std::string& server) {
  const std::string path = ClusterNotePath(server);
  TANDEM_RETURN_IF_ERROR(CheckDirectory());
  if (!FileExists(path)) return NotFound("{}: not there", path);
  TANDEM_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  std::istringstream lines(text);
  ClusterNote note;
  std::getline(lines, note.internal_address);
  std::getline(lines, note.secret);
  return note;
}

void RemoveClusterNote(const std::string& server) { unlink(ClusterNotePath(server).c_str()); }

}  // namespace tandem::cli
