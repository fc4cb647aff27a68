// Certificates and keys as PEM text: whether they are what they should be.
//
// Pure functions, thread-safe. Messages say what is wrong and never quote a key.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace tandem {

// What one end of TLS shows, and whom it believes.
struct TlsTexts {
  std::string certificate;  // its own first, then those that lead to its CA
  std::string key;          // not encrypted
  std::string ca;           // of the other end; "": it needs no certificate
  int64_t generation = 0;   // grows with each change
};

// `chain` begins with a certificate that holds at `now` and whose key is `key`. Returns until when
// it holds.
absl::StatusOr<absl::Time> CheckCertificateAndKey(const std::string& chain, const std::string& key,
                                                  absl::Time now);
// At least one certificate, and none that cannot be read.
absl::Status CheckCertificates(const std::string& pem);

}  // namespace tandem
