// How the other commands of the same user speak with the `tandem up` that runs a cluster: a Unix
// socket beside the cluster's note (cli/cluster_note.h). Who can open it could read the cluster's
// secret in the note too, so it asks for no other proof. One JSON object asks, one answers;
// {"error": "..."} says why not.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

#include "common/base/fd.h"

namespace tandem::cli {

// Not thread-safe. The destructor takes the socket away.
class ControlSocket {
 public:
  using Handler = std::function<absl::StatusOr<nlohmann::json>(const nlohmann::json& request)>;

  // `server` is the cluster's public address, of which there is a note already.
  static absl::StatusOr<std::unique_ptr<ControlSocket>> Listen(const std::string& server,
                                                               Handler handler);
  ~ControlSocket();
  ControlSocket(const ControlSocket&) = delete;
  ControlSocket& operator=(const ControlSocket&) = delete;

  // Readable when somebody asks.
  int fd() const { return fd_.get(); }
  // Answers one who asks. Waits for the request, which is sent at once, but 0.2 s at most.
  void Answer();

 private:
  ControlSocket(std::string path, Fd fd, Handler handler)
      : path_(std::move(path)), fd_(std::move(fd)), handler_(std::move(handler)) {}

  const std::string path_;
  const Fd fd_;
  const Handler handler_;
};

// NOT_FOUND: no `tandem up` of this user runs the cluster at `server`; FAILED_PRECONDITION: what it
// says against it.
absl::StatusOr<nlohmann::json> AskUp(const std::string& server, const nlohmann::json& request);

}  // namespace tandem::cli
