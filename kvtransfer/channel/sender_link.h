// A sender's connection to one peer, from the handshake on: what the peer holds, which transport
// the two agreed on, and how fast it was found to be.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"

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
  // Dials, shakes hands, selects a transport and measures it. `on_dialed` is given the connection
  // as soon as there is one, so that others can shut it down; false: give up.
  static absl::StatusOr<std::unique_ptr<SenderLink>> Connect(
      const LinkContext& context, const PeerAddress& peer,
      absl::FunctionRef<bool(std::shared_ptr<KvConnection>)> on_dialed);
  // Shuts the connection down and detaches the writer.
  ~SenderLink();
  SenderLink(const SenderLink&) = delete;

  KvConnection* connection() const { return connection_.get(); }
  KvWriter* writer() const { return writer_.get(); }
  const KvTransport& transport() const { return *transport_; }
  const Hello& peer() const { return peer_; }
  double probed_rate() const { return probed_rate_; }  // bytes per second
  double expected_rate() const;
  // True the first time that a rate below expected_rate() is told: it is warned of and counted.
  bool NoteRate(double rate);

 private:
  SenderLink(const LinkContext& context, std::shared_ptr<KvConnection> connection)
      : context_(context), connection_(std::move(connection)) {}
  absl::Status ShakeHands(const PeerAddress& peer);
  // Tries what both ends have, the best first.
  absl::Status SelectTransport(const std::string& offered);
  absl::Status Select(const std::string& name);

  const LinkContext context_;
  const std::shared_ptr<KvConnection> connection_;
  Hello peer_;
  const KvTransport* transport_ = nullptr;
  std::unique_ptr<KvWriter> writer_;
  double probed_rate_ = 0;
  bool found_slow_ = false;
};

}  // namespace tandem::kvtransfer
