#include "tests/support/certificates.h"

#include <atomic>

#include "absl/time/clock.h"
#include "gtest/gtest.h"

#include "openssl/bio.h"
#include "openssl/evp.h"
#include "openssl/pem.h"
#include "openssl/x509.h"
#include "openssl/x509v3.h"

namespace tandem {
namespace {

constexpr absl::Duration kBefore = absl::Hours(1);

template <typename Write>
std::string ToPem(Write write) {
  BIO* bio = BIO_new(BIO_s_mem());
  EXPECT_EQ(write(bio), 1);
  char* data = nullptr;
  const long size = BIO_get_mem_data(bio, &data);
  std::string pem(data, static_cast<size_t>(size));
  BIO_free_all(bio);
  return pem;
}

std::string CertificatePem(X509* certificate) {
  return ToPem([&](BIO* bio) { return PEM_write_bio_X509(bio, certificate); });
}

void AddExtension(X509* certificate, int nid, const char* value) {
  X509_EXTENSION* extension = X509V3_EXT_conf_nid(nullptr, nullptr, nid, value);
  ASSERT_NE(extension, nullptr) << value;
  EXPECT_EQ(X509_add_ext(certificate, extension, -1), 1);
  X509_EXTENSION_free(extension);
}

// Not signed yet.
X509* NewCertificate(const std::string& name, EVP_PKEY* key, absl::Duration valid) {
  static std::atomic<long> serial = 1;
  X509* certificate = X509_new();
  X509_set_version(certificate, X509_VERSION_3);
  ASN1_INTEGER_set(X509_get_serialNumber(certificate), serial++);
  const time_t now = absl::ToTimeT(absl::Now());
  ASN1_TIME_set(X509_getm_notBefore(certificate), now - absl::ToInt64Seconds(kBefore));
  ASN1_TIME_set(X509_getm_notAfter(certificate), now + absl::ToInt64Seconds(valid));
  X509_set_pubkey(certificate, key);
  X509_NAME_add_entry_by_txt(X509_get_subject_name(certificate), "CN", MBSTRING_ASC,
                             reinterpret_cast<const unsigned char*>(name.c_str()), -1, -1, 0);
  return certificate;
}

}  // namespace

struct TestCa::Impl {
  EVP_PKEY* key = EVP_EC_gen("P-256");
  X509* certificate = nullptr;
  ~Impl() {
    X509_free(certificate);
    EVP_PKEY_free(key);
  }
};

TestCa::TestCa(const std::string& name) : impl_(std::make_unique<Impl>()) {
  X509* certificate = NewCertificate(name, impl_->key, absl::Hours(1000));
  X509_set_issuer_name(certificate, X509_get_subject_name(certificate));
  AddExtension(certificate, NID_basic_constraints, "critical,CA:TRUE");
  EXPECT_NE(X509_sign(certificate, impl_->key, EVP_sha256()), 0);
  impl_->certificate = certificate;
  certificate_ = CertificatePem(certificate);
}

TestCa::~TestCa() = default;

TestCertificate TestCa::Issue(absl::Duration valid) const {
  EVP_PKEY* key = EVP_EC_gen("P-256");
  X509* certificate = NewCertificate("tandem test", key, valid);
  X509_set_issuer_name(certificate, X509_get_subject_name(impl_->certificate));
  AddExtension(certificate, NID_subject_alt_name, "IP:127.0.0.1,IP:::1,DNS:localhost");
  EXPECT_NE(X509_sign(certificate, impl_->key, EVP_sha256()), 0);
  TestCertificate out;
  out.certificate = CertificatePem(certificate);
  out.key = ToPem([&](BIO* bio) {
    return PEM_write_bio_PrivateKey(bio, key, nullptr, nullptr, 0, nullptr, nullptr);
  });
  X509_free(certificate);
  EVP_PKEY_free(key);
  return out;
}

}  // namespace tandem
