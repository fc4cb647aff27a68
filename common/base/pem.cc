#include "common/base/pem.h"

#include <ctime>
#include <memory>

#include "common/base/status.h"
#include "openssl/bio.h"
#include "openssl/err.h"
#include "openssl/evp.h"
#include "openssl/pem.h"
#include "openssl/x509.h"

namespace tandem {
namespace {

template <typename T, void (*kFree)(T*)>
struct Freed {
  void operator()(T* object) const { kFree(object); }
};
using KeyPtr = std::unique_ptr<EVP_PKEY, Freed<EVP_PKEY, EVP_PKEY_free>>;
using CertificatePtr = std::unique_ptr<X509, Freed<X509, X509_free>>;
using BioPtr = std::unique_ptr<BIO, Freed<BIO, BIO_free_all>>;

BioPtr Reader(const std::string& pem) {
  return BioPtr(BIO_new_mem_buf(pem.data(), static_cast<int>(pem.size())));
}

CertificatePtr NextCertificate(BIO* bio) {
  return CertificatePtr(PEM_read_bio_X509(bio, nullptr, nullptr, nullptr));
}

// Asks nobody at a terminal for the password of a key that has one.
int NoPassword(char* /*buffer*/, int /*size*/, int /*writing*/, void* /*data*/) { return -1; }

absl::StatusOr<absl::Time> TimeOf(const ASN1_TIME* time) {
  std::tm parts{};
  if (ASN1_TIME_to_tm(time, &parts) != 1) return InvalidArgument("it has no date that can be read");
  return absl::FromTM(parts, absl::UTCTimeZone());
}

std::string Date(absl::Time time) {
  return absl::FormatTime("%Y-%m-%d %H:%M:%S UTC", time, absl::UTCTimeZone());
}

}  // namespace

absl::StatusOr<absl::Time> CheckCertificateAndKey(const std::string& chain, const std::string& key,
                                                  absl::Time now) {
  TANDEM_RETURN_IF_ERROR(CheckCertificates(chain));
  const CertificatePtr certificate = NextCertificate(Reader(chain).get());
  const KeyPtr private_key(
      PEM_read_bio_PrivateKey(Reader(key).get(), nullptr, NoPassword, nullptr));
  ERR_clear_error();
  if (private_key == nullptr) {
    return InvalidArgument("the key is no PEM text of a private key without a password");
  }
  if (X509_check_private_key(certificate.get(), private_key.get()) != 1) {
    ERR_clear_error();
    return InvalidArgument("the key is not that of the certificate");
  }
  TANDEM_ASSIGN_OR_RETURN(const absl::Time from, TimeOf(X509_get0_notBefore(certificate.get())));
  TANDEM_ASSIGN_OR_RETURN(const absl::Time until, TimeOf(X509_get0_notAfter(certificate.get())));
  if (now < from) return InvalidArgument("the certificate holds only from {} on", Date(from));
  if (now > until) return InvalidArgument("the certificate has expired at {}", Date(until));
  return until;
}

absl::Status CheckCertificates(const std::string& pem) {
  const BioPtr bio = Reader(pem);
  int count = 0;
  while (NextCertificate(bio.get()) != nullptr) ++count;
  // That nothing more begins is the end; all else is a certificate that cannot be read.
  const bool ended = ERR_GET_REASON(ERR_peek_last_error()) == PEM_R_NO_START_LINE;
  ERR_clear_error();
  if (count == 0 || !ended) return InvalidArgument("it is no PEM text of certificates");
  return absl::OkStatus();
}

}  // namespace tandem
