// A sender's connection to one peer, from the handshake on: what the peer holds, which transport
// the two agreed on, and what its self-test found.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"

#include "common/base/kv_link.h"
#include "kvtransfer/channel/hello.h"
#include "kvtransfer/channel/kv_counter_block.h"
#include "kvtransfer/channel/kv_endpoints.h"
#include "kvtransfer/channel/registered_transport.h"
#include "kvtransfer/transport/kv_connection.h"
#include "kvtransfer/transport/kv_transport.h"

namespace tandem::kvtransfer {

// What all links of one sender share. Outlives them.
struct LinkContext {
  const KvSenderOptions* options;
  const KvStore* store;
  const std::vector<RegisteredTransport>* transports;  // in order of preference
  KvNetwork* network;
  KvCounterBlock* counters;
};

// Whom to reach.
struct PeerAddress {
  std::string address;     // HOST:PORT
  std::string worker_id;   // if not empty, the peer must present it
  std::string transports;  // that it offers, as ParseTransports reads it
};

// Belongs to one thread; only Interrupt() and Shutdown() of its connection may be called by others.
class SenderLink {
 public:
  // Dials, shakes hands, selects a transport and tests it. `on_dialed` is given the connection as
  // soon as there is one, so that others can shut it down; false: give up. An error leaves in
  // `refused` what is known of a link that may carry nothing, if it is for that: else it is as it
  // was.
  static absl::StatusOr<std::unique_ptr<SenderLink>> Connect(
      const LinkContext& context, const PeerAddress& peer,
      absl::FunctionRef<bool(std::shared_ptr<KvConnection>)> on_dialed,
      std::optional<KvLink>* refused);
  // Shuts the connection down and detaches the writer.
  ~SenderLink();
  SenderLink(const SenderLink&) = delete;

  KvConnection* connection() const { return connection_.get(); }
  KvWriter* writer() const { return writer_.get(); }
  const KvTransport& transport() const { return *transport_; }
  const Hello& peer() const { return peer_; }
  // What is known of it. A rate below what is expected is warned of, once, and counted.
  const KvLink& found() const { return found_; }
  void NoteRate(double bytes_per_second);

 private:
  SenderLink(const LinkContext& context, std::shared_ptr<KvConnection> connection)
      : context_(context), connection_(std::move(connection)) {}
  absl::Status ShakeHands(const PeerAddress& peer);
  // Tries what both ends have, the best first, until one works and carries the pattern.
  absl::Status SelectTransport(const std::string& offered);
  absl::Status TryTransport(const RegisteredTransport& own, const std::string& advert);
  // An error if the link is too slow to be used.
  absl::Status CheckFloor();
  // Why `own` is not used, for found_.note.
  void NoteUnused(const RegisteredTransport& own, std::string_view why);
  absl::Status Select(const std::string& name, const std::string& note);

  const LinkContext context_;
  const std::shared_ptr<KvConnection> connection_;
  Hello peer_;
  const KvTransport* transport_ = nullptr;
  std::unique_ptr<KvWriter> writer_;
  KvLink found_;
};

}  // namespace tandem::kvtransfer
