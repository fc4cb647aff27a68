// A certificate, its key, and the CA that others' certificates must be of: PEM files, watched and
// read again when they change.
//
// A change is taken over only as a whole: a key that is not the certificate's, one that cannot be
// read, and a certificate that has expired change nothing, and the log says so every minute
// (FileWatch).
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "common/base/file_watch.h"
#include "common/base/pem.h"

namespace tandem {

// Paths, or the flags that name them.
struct TlsFiles {
  std::string certificate;  // one's own first, then those that lead to its CA
  std::string key;          // not encrypted
  std::string ca;           // "": nobody else needs a certificate
};

// Thread-safe.
class CertificateFiles {
 public:
  // `flags` are what messages call the files. `on_certificate` is told when the certificate will
  // expire: now, and after each change, from any thread; may be null.
  static absl::StatusOr<std::shared_ptr<CertificateFiles>> Open(
      const TlsFiles& files, TlsFiles flags,
      std::function<void(absl::Time not_after)> on_certificate);

  // What is in force now.
  TlsTexts texts() const;
  // `listener` is called after each change, from a thread of this, until it is removed, which waits
  // for a call that runs. It adds and removes none.
  int AddListener(std::function<void()> listener);
  void RemoveListener(int id);

 private:
  CertificateFiles(const TlsFiles& files, TlsFiles flags,
                   std::function<void(absl::Time)> on_certificate);
  absl::Status Take(const FileWatch::Contents& contents);

  const TlsFiles files_;
  const TlsFiles flags_;
  const std::function<void(absl::Time)> on_certificate_;
  mutable absl::Mutex mutex_;
  TlsTexts texts_ ABSL_GUARDED_BY(mutex_);
  absl::Mutex listeners_mutex_;  // before mutex_
  int next_listener_ ABSL_GUARDED_BY(listeners_mutex_) = 0;
  std::map<int, std::function<void()>> listeners_ ABSL_GUARDED_BY(listeners_mutex_);
  std::unique_ptr<FileWatch> watch_;  // last: its thread uses the rest; constant after Open
};

}  // namespace tandem
