// TLS 1.3 over a connected socket, where both ends show a certificate: for what speaks no gRPC.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <sys/uio.h>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "common/base/pem.h"

struct ssl_ctx_st;
struct ssl_st;
struct bio_st;

namespace tandem {

// What an end shows and whom it believes; shared by its connections. Immutable.
class TlsContext {
 public:
  // INVALID_ARGUMENT for texts that OpenSSL does not take.
  static absl::StatusOr<std::shared_ptr<const TlsContext>> Make(const TlsTexts& texts);
  ~TlsContext();

  ssl_ctx_st* get() const { return context_; }

 private:
  explicit TlsContext(ssl_ctx_st* context) : context_(context) {}

  ssl_ctx_st* const context_;
};

// The context of what `texts` says now. Thread-safe.
class TlsContexts {
 public:
  explicit TlsContexts(std::function<TlsTexts()> texts) : texts_(std::move(texts)) {}

  absl::StatusOr<std::shared_ptr<const TlsContext>> Now();

 private:
  const std::function<TlsTexts()> texts_;
  absl::Mutex mutex_;
  std::shared_ptr<const TlsContext> context_ ABSL_GUARDED_BY(mutex_);  // of generation_
  int64_t generation_ ABSL_GUARDED_BY(mutex_) = 0;
};

// Thread-safe; Handshake before the rest. Only Handshake waits.
class TlsStream {
 public:
  enum class End { kDials, kAccepts };

  // `fd` is non-blocking and outlives this; `peer` is for messages.
  static absl::StatusOr<std::unique_ptr<TlsStream>> Make(
      int fd, std::string peer, const std::shared_ptr<const TlsContext>& context, End end);
  ~TlsStream();

  // The first call does it, within `timeout` in all; others wait for it. UNAUTHENTICATED says what
  // is wrong with the peer, UNAVAILABLE that it left, or did not finish in time. Who must not wait
  // leaves it out: Receive does it too, with a Flush behind each call.
  absl::Status Handshake(absl::Duration timeout);

  // Takes as many bytes of `from`, in order, as there is room for: 0 until the socket takes more.
  absl::StatusOr<size_t> Send(std::span<const iovec> from);
  // Whether all that was taken is on its way.
  absl::StatusOr<bool> Flush();
  // Fills `into` from the front with what is here; 0: nothing.
  absl::StatusOr<size_t> Receive(std::span<const iovec> into);
  // Whether Receive has something, or an error, though the socket may have nothing to read.
  bool HasInput();

 private:
  TlsStream(int fd, std::string peer, std::shared_ptr<const TlsContext> context, ssl_st* ssl);

  absl::Status ShakeHands(absl::Duration timeout) ABSL_EXCLUSIVE_LOCKS_REQUIRED(handshake_mutex_);
  // Whether nothing is left to send.
  absl::StatusOr<bool> SendPending() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Takes what the socket has; false: nothing.
  absl::StatusOr<bool> ReceivePending() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Status Failure() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const int fd_;
  const std::string peer_;
  const std::shared_ptr<const TlsContext> context_;

  absl::Mutex handshake_mutex_;  // before mutex_
  bool shaken_ ABSL_GUARDED_BY(handshake_mutex_) = false;
  absl::Status handshake_ ABSL_GUARDED_BY(handshake_mutex_);

  // Of OpenSSL's object, which one thread at a time may use; held for no wait.
  absl::Mutex mutex_;
  ssl_st* const ssl_ ABSL_PT_GUARDED_BY(mutex_);
  bio_st* in_ ABSL_PT_GUARDED_BY(mutex_);         // what came, still encrypted
  bool drained_ ABSL_GUARDED_BY(mutex_) = false;  // of what came nothing can be read
  // What goes, encrypted: [out_begin_, out_end_).
  std::vector<std::byte> out_ ABSL_GUARDED_BY(mutex_);
  size_t out_begin_ ABSL_GUARDED_BY(mutex_) = 0;
  size_t out_end_ ABSL_GUARDED_BY(mutex_) = 0;
  std::vector<std::byte> piece_ ABSL_GUARDED_BY(mutex_);  // of one recv()
  uint64_t bytes_by_key_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace tandem
