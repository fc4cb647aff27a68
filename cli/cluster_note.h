// The note that `tandem up` leaves for the other commands of the same user: where the cluster with
// a public address is administered, and the secret that proves the right to. A file that only this
// user can read, in a directory that only this user can write.
#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace tandem::cli {

struct ClusterNote {
  std::string internal_address;  // HOST:PORT
  std::string secret;

  bool operator==(const ClusterNote&) const = default;
};

// `server` is the public address. Replaces an older note.
absl::Status WriteClusterNote(const std::string& server, const ClusterNote& note);
// The public addresses of all clusters that there are notes of.
std::vector<std::string> ListClusterNotes();
// Where things of the cluster at `server` lie; the directory must have been checked.
std::string ClusterNotePath(const std::string& server);
// NOT_FOUND: there is none; PERMISSION_DENIED: others could have written it.
absl::StatusOr<ClusterNote> ReadClusterNote(const std::string& server);
void RemoveClusterNote(const std::string& server);

}  // namespace tandem::cli
