// Certificates made within a test, by OpenSSL.
#pragma once

#include <memory>
#include <string>

#include "absl/time/time.h"

namespace tandem {

// PEM texts.
struct TestCertificate {
  std::string certificate;
  std::string key;
};

// A CA of its own, which is in nobody's store.
class TestCa {
 public:
  explicit TestCa(const std::string& name);
  ~TestCa();

  const std::string& certificate() const { return certificate_; }
  // For 127.0.0.1, ::1 and localhost, as a server's or a client's. Holds from an hour before now
  // until `valid` after now; before now: it has expired.
  TestCertificate Issue(absl::Duration valid = absl::Hours(24)) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
  std::string certificate_;
};

}  // namespace tandem
