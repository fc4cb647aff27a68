// Where a front plugs in: the client's side of one RequestStream.
//
// A front is whatever speaks with clients: gRPC today (router/api/generate_reactor.h), HTTP with
// server-sent events beside it. For each request it
//
//   1. shows the router's KeyRing, if it has one, what came as `authorization`, and reads its own
//      message into a Request (an HTTP front fills a tandem.v1 message from JSON and calls
//      router/api/request_wire.h like the gRPC one),
//   2. takes a slot of RouterCore::open_streams(), which a draining router waits for,
//   3. calls RouterCore::NewStream(request, sink), answers with its status if that fails, keeps the
//      stream and calls RequestStream::Begin,
//   4. writes what Write() brings, and tells RequestStream::OnWritten when the client has taken it,
//   5. tells RequestStream::OnClientGone when the client has cancelled or disconnected,
//   6. ends the answer when Finish() comes, and gives the slot back when its last byte is out.
//
// Everything else is the stream's: queue, routing, retries, text, stop strings, timing, metrics,
// deadline, back-pressure. A front that is slow to call OnWritten slows its own request only.
#pragma once

#include "absl/status/status.h"

#include "router/request/request.h"

namespace tandem::router {

// Called under the stream's lock: must not call back into the stream, and must not block.
class StreamSink {
 public:
  virtual ~StreamSink() = default;
  // The next Write or Finish comes only after RequestStream::OnWritten.
  virtual void Write(const GenerateResponse& response) = 0;
  // Last call. Not OK after a Write with a finish reason kAbort, or instead of any Write.
  virtual void Finish(const absl::Status& status) = 0;
  // Makes an unfinished Write fail soon: the client has not taken it in time. Finish still follows.
  virtual void Abort() = 0;
};

}  // namespace tandem::router
