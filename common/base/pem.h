// Certificates and keys as PEM text: whether they are what they should be.
//
// Pure functions, thread-safe. Messages say what is wrong and never quote a key.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace tandem {

// `chain` begins with a certificate that holds at `now` and whose key is `key`. Returns until when
// it holds.
absl::StatusOr<absl::Time> CheckCertificateAndKey(const std::string& chain, const std::string& key,
                                                  absl::Time now);
// At least one certificate, and none that cannot be read.
absl::Status CheckCertificates(const std::string& pem);

}  // namespace tandem
