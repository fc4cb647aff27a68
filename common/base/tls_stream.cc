#include "common/base/tls_stream.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <poll.h>
#include <sys/socket.h>
#include <utility>

#include "common/base/clock.h"
#include "common/base/status.h"
#include "openssl/bio.h"
#include "openssl/err.h"
#include "openssl/pem.h"
#include "openssl/ssl.h"
#include "openssl/x509v3.h"

namespace tandem {
namespace {

// Encrypted at a time before the socket is asked to take it: some records of at most 16 KiB.
constexpr size_t kSendBytes = 256 << 10;
constexpr size_t kReceiveBytes = 256 << 10;
// RFC 8446, 5.5: one key of AES-GCM is good for about 2^24.5 whole records, 380 GB.
constexpr uint64_t kBytesByKey = uint64_t{64} << 30;

std::string LastError() {
  const unsigned long error = ERR_peek_last_error();
  const char* reason = error == 0 ? nullptr : ERR_reason_error_string(error);
  ERR_clear_error();
  return reason == nullptr ? "unknown error" : reason;
}

// False at the deadline.
bool Await(int fd, short events, absl::Time deadline) {
  while (true) {
    const absl::Duration left = deadline - Clock::Real()->Now();
    const int64_t wait_ms = absl::ToInt64Milliseconds(left + absl::Microseconds(999));
    pollfd entry = {fd, events, 0};
    const int n = poll(&entry, 1, static_cast<int>(std::clamp<int64_t>(wait_ms, 0, 1 << 30)));
    if (n != 0 && (n > 0 || errno != EINTR)) return n > 0;
    if (n == 0 && left <= absl::ZeroDuration()) return false;
  }
}

struct FreeBio {
  void operator()(BIO* bio) const { BIO_free_all(bio); }
};
using OwnedBio = std::unique_ptr<BIO, FreeBio>;

OwnedBio OpenPem(const std::string& pem) {
  return OwnedBio(BIO_new_mem_buf(pem.data(), static_cast<int>(pem.size())));
}

bool UseChain(SSL_CTX* context, const std::string& pem) {
  const OwnedBio bio = OpenPem(pem);
  X509* own = PEM_read_bio_X509(bio.get(), nullptr, nullptr, nullptr);
  const bool used = own != nullptr && SSL_CTX_use_certificate(context, own) == 1;
  X509_free(own);
  if (!used) return false;
  while (X509* next = PEM_read_bio_X509(bio.get(), nullptr, nullptr, nullptr)) {
    SSL_CTX_add_extra_chain_cert(context, next);  // which takes it
  }
  return true;
}

bool UseKey(SSL_CTX* context, const std::string& pem) {
  const OwnedBio bio = OpenPem(pem);
  EVP_PKEY* key = PEM_read_bio_PrivateKey(bio.get(), nullptr, nullptr, nullptr);
  const bool used = key != nullptr && SSL_CTX_use_PrivateKey(context, key) == 1;
  EVP_PKEY_free(key);
  return used;
}

void Believe(SSL_CTX* context, const std::string& pem) {
  const OwnedBio bio = OpenPem(pem);
  X509_STORE* const store = SSL_CTX_get_cert_store(context);
  while (X509* ca = PEM_read_bio_X509(bio.get(), nullptr, nullptr, nullptr)) {
    X509_STORE_add_cert(store, ca);
    X509_free(ca);
  }
}

}  // namespace

absl::StatusOr<std::shared_ptr<const TlsContext>> TlsContext::Make(const TlsTexts& texts) {
  SSL_CTX* const context = SSL_CTX_new(TLS_method());
  if (context == nullptr) return Internal("OpenSSL has no TLS");
  std::shared_ptr<const TlsContext> made(new TlsContext(context));
  SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION);
  SSL_CTX_set_ciphersuites(context, "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384");
  SSL_CTX_set_num_tickets(context, 0);  // each connection is judged by what holds then
  SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF);
  SSL_CTX_set_mode(context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
  SSL_CTX_set_verify(context, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, nullptr);
  // Both ends are servers and clients; who they are the proofs say that follow.
  X509_VERIFY_PARAM_set_purpose(SSL_CTX_get0_param(context), X509_PURPOSE_ANY);
  if (!UseChain(context, texts.certificate) || !UseKey(context, texts.key)) {
    return InvalidArgument("TLS: {}", LastError());
  }
  Believe(context, texts.ca);
  ERR_clear_error();
  return made;
}

TlsContext::~TlsContext() { SSL_CTX_free(context_); }

absl::StatusOr<std::shared_ptr<const TlsContext>> TlsContexts::Now() {
  const TlsTexts texts = texts_();
  absl::MutexLock lock(&mutex_);
  if (context_ == nullptr || generation_ != texts.generation) {
    TANDEM_ASSIGN_OR_RETURN(context_, TlsContext::Make(texts));
    generation_ = texts.generation;
  }
  return context_;
}

TlsStream::TlsStream(int fd, std::string peer, std::shared_ptr<const TlsContext> context,
                     ssl_st* ssl)
    : fd_(fd), peer_(std::move(peer)), context_(std::move(context)), ssl_(ssl), in_(nullptr) {
  piece_.resize(kReceiveBytes);
}

TlsStream::~TlsStream() { SSL_free(ssl_); }

absl::StatusOr<std::unique_ptr<TlsStream>> TlsStream::Make(
    int fd, std::string peer, const std::shared_ptr<const TlsContext>& context, End end) {
  SSL* const ssl = SSL_new(context->get());
  BIO* const in = BIO_new(BIO_s_mem());
  BIO* const out = BIO_new(BIO_s_mem());
  if (ssl == nullptr || in == nullptr || out == nullptr) {
    SSL_free(ssl);
    BIO_free(in);
    BIO_free(out);
    return ResourceExhausted("OpenSSL has no memory for a connection");
  }
  SSL_set_bio(ssl, in, out);
  end == End::kDials ? SSL_set_connect_state(ssl) : SSL_set_accept_state(ssl);
  std::unique_ptr<TlsStream> stream(new TlsStream(fd, std::move(peer), context, ssl));
  absl::MutexLock lock(&stream->mutex_);
  stream->in_ = in;
  return stream;
}

absl::Status TlsStream::Handshake(absl::Duration timeout) {
  absl::MutexLock lock(&handshake_mutex_);
  if (!shaken_) {
    handshake_ = ShakeHands(timeout);
    shaken_ = true;
  }
  return handshake_;
}

absl::Status TlsStream::ShakeHands(absl::Duration timeout) {
  const absl::Time deadline = Clock::Real()->Now() + timeout;
  while (true) {
    bool done = false, all_sent = false;
    {
      absl::MutexLock lock(&mutex_);
      ERR_clear_error();
      const int result = SSL_do_handshake(ssl_);
      const int error = SSL_get_error(ssl_, result);
      done = result == 1;
      const absl::StatusOr<bool> sent = SendPending();  // an alert, too, that says why
      if (!done && error != SSL_ERROR_WANT_READ && error != SSL_ERROR_WANT_WRITE) return Failure();
      TANDEM_RETURN_IF_ERROR(sent.status());
      all_sent = *sent;
      if (done && all_sent) return absl::OkStatus();
      if (all_sent) {
        TANDEM_ASSIGN_OR_RETURN(const bool more, ReceivePending());
        if (more) continue;
      }
    }
    if (!Await(fd_, all_sent ? POLLIN : POLLOUT, deadline)) {
      return Unavailable("{} did not finish the TLS handshake within {}", peer_,
                         absl::FormatDuration(timeout));
    }
  }
}

absl::Status TlsStream::Failure() const {
  const long verified = SSL_get_verify_result(ssl_);
  const std::string why =
      verified != X509_V_OK ? X509_verify_cert_error_string(verified) : LastError();
  ERR_clear_error();
  return absl::UnauthenticatedError(
      fmt::format("TLS with {} (--cluster-cert, --cluster-ca): {}", peer_, why));
}

absl::StatusOr<bool> TlsStream::SendPending() {
  BIO* const made = SSL_get_wbio(ssl_);
  while (true) {
    if (out_begin_ == out_end_) {
      out_begin_ = 0;
      out_end_ = BIO_ctrl_pending(made);
      if (out_end_ == 0) return true;
      if (out_.size() < out_end_) out_.resize(out_end_);
      BIO_read(made, out_.data(), static_cast<int>(out_end_));
    }
    const ssize_t n =
        send(fd_, out_.data() + out_begin_, out_end_ - out_begin_, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n >= 0) {
      out_begin_ += static_cast<size_t>(n);
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      return false;
    } else if (errno != EINTR) {
      return Unavailable("sending to {}: {}", peer_, std::strerror(errno));
    }
  }
}

absl::StatusOr<bool> TlsStream::ReceivePending() {
  while (true) {
    const ssize_t n = recv(fd_, piece_.data(), piece_.size(), MSG_DONTWAIT);
    if (n > 0) {
      BIO_write(in_, piece_.data(), static_cast<int>(n));
      return true;
    }
    if (n == 0) return Unavailable("{} closed the connection", peer_);
    if (errno == EAGAIN || errno == EWOULDBLOCK) return false;
    if (errno != EINTR) return Unavailable("receiving from {}: {}", peer_, std::strerror(errno));
  }
}

absl::StatusOr<size_t> TlsStream::Send(std::span<const iovec> from) {
  absl::MutexLock lock(&mutex_);
  TANDEM_ASSIGN_OR_RETURN(const bool room, SendPending());
  if (!room) return size_t{0};
  size_t taken = 0;
  for (const iovec& part : from) {
    const size_t size = std::min(part.iov_len, kSendBytes - taken);
    for (size_t done = 0; done < size;) {
      size_t n = 0;
      if (SSL_write_ex(ssl_, static_cast<const char*>(part.iov_base) + done, size - done, &n) !=
          1) {
        return Unavailable("sending to {}: {}", peer_, LastError());
      }
      done += n;
    }
    taken += size;
    if (taken == kSendBytes) break;
  }
  bytes_by_key_ += taken;
  if (bytes_by_key_ >= kBytesByKey) {
    bytes_by_key_ = 0;
    SSL_key_update(ssl_, SSL_KEY_UPDATE_NOT_REQUESTED);  // before the next record
  }
  TANDEM_RETURN_IF_ERROR(SendPending().status());
  return taken;
}

absl::StatusOr<bool> TlsStream::Flush() {
  absl::MutexLock lock(&mutex_);
  return SendPending();
}

absl::StatusOr<size_t> TlsStream::Receive(std::span<const iovec> into) {
  absl::MutexLock lock(&mutex_);
  ERR_clear_error();
  size_t received = 0;
  for (const iovec& part : into) {
    for (size_t done = 0; done < part.iov_len;) {
      size_t n = 0;
      const int result =
          SSL_read_ex(ssl_, static_cast<char*>(part.iov_base) + done, part.iov_len - done, &n);
      if (result == 1) {
        done += n;
        received += n;
        continue;
      }
      const int error = SSL_get_error(ssl_, result);
      if (error == SSL_ERROR_ZERO_RETURN) return Unavailable("{} closed the connection", peer_);
      if (error != SSL_ERROR_WANT_READ) return Failure();
      drained_ = true;
      if (received > 0) return received;
      TANDEM_ASSIGN_OR_RETURN(const bool more, ReceivePending());
      if (!more) return size_t{0};
    }
  }
  drained_ = false;
  return received;
}

bool TlsStream::HasInput() {
  absl::MutexLock lock(&mutex_);
  if (drained_) return false;
  // Not SSL_has_pending, which is also true of half a record: who is told that something is here
  // waits for the rest of it.
  ERR_clear_error();
  char byte = 0;
  size_t n = 0;
  const int result = SSL_peek_ex(ssl_, &byte, 1, &n);
  drained_ = result != 1 && SSL_get_error(ssl_, result) == SSL_ERROR_WANT_READ;
  return !drained_;
}

}  // namespace tandem
