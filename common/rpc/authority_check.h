// Whether the key of a connection was signed by that of a certificate of the cluster's CA
// (ClusterCredentials).
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"

#include "common/auth/certificate_files.h"

struct x509_store_st;

namespace tandem {

// Thread-safe.
class AuthorityCheck {
 public:
  // The CA is that of `files`, as it is when it is asked.
  explicit AuthorityCheck(std::shared_ptr<CertificateFiles> files);
  ~AuthorityCheck();

  // PEM texts: the certificate that the peer has made of its key, and all that it has shown, with
  // or without that. UNAUTHENTICATED says what is missing.
  absl::Status Check(std::string_view own, std::string_view shown);

 private:
  x509_store_st* Store() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const std::shared_ptr<CertificateFiles> files_;
  absl::Mutex mutex_;
  x509_store_st* store_ ABSL_GUARDED_BY(mutex_) = nullptr;  // of the CA of generation_
  int64_t generation_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace tandem
