#include "common/rpc/authority_check.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "fmt/format.h"

#include "openssl/bio.h"
#include "openssl/err.h"
#include "openssl/pem.h"
#include "openssl/x509.h"
#include "openssl/x509_vfy.h"

namespace tandem {
namespace {

template <typename T, void (*kFree)(T*)>
struct FreedBy {
  void operator()(T* object) const { kFree(object); }
};
using OwnedCertificate = std::unique_ptr<X509, FreedBy<X509, X509_free>>;
using OwnedContext = std::unique_ptr<X509_STORE_CTX, FreedBy<X509_STORE_CTX, X509_STORE_CTX_free>>;

std::vector<OwnedCertificate> ParseAll(std::string_view pem) {
  std::vector<OwnedCertificate> out;
  BIO* const bio = BIO_new_mem_buf(pem.data(), static_cast<int>(pem.size()));
  while (X509* const next = PEM_read_bio_X509(bio, nullptr, nullptr, nullptr)) {
    out.emplace_back(next);
  }
  BIO_free(bio);
  ERR_clear_error();
  return out;
}

}  // namespace

AuthorityCheck::AuthorityCheck(std::shared_ptr<CertificateFiles> files)
    : files_(std::move(files)) {}

AuthorityCheck::~AuthorityCheck() { X509_STORE_free(store_); }

absl::Status AuthorityCheck::Check(std::string_view own, std::string_view shown) {
  const std::vector<OwnedCertificate> first = ParseAll(own);
  std::vector<OwnedCertificate> chain = ParseAll(shown);
  if (first.empty()) return absl::UnauthenticatedError("the peer shows nothing that can be read");
  X509* const key_holder = first.front().get();
  std::erase_if(chain, [key_holder](const OwnedCertificate& one) {
    return X509_cmp(one.get(), key_holder) == 0;
  });
  if (chain.empty()) {
    return absl::UnauthenticatedError(
        "the peer shows no certificate (all processes of a cluster have --cluster-cert, or none)");
  }
  X509* const certificate = chain.front().get();
  const bool is_its_holder = X509_verify(key_holder, X509_get0_pubkey(certificate)) == 1;
  ERR_clear_error();
  if (!is_its_holder) {
    return absl::UnauthenticatedError("the peer does not hold the key of its certificate");
  }
  STACK_OF(X509)* const others = sk_X509_new_null();
  for (size_t i = 1; i < chain.size(); ++i) sk_X509_push(others, chain[i].get());
  absl::Status status;
  {
    absl::MutexLock lock(&mutex_);
    const OwnedContext context(X509_STORE_CTX_new());
    X509_STORE_CTX_init(context.get(), Store(), certificate, others);
    if (X509_verify_cert(context.get()) != 1) {
      status = absl::UnauthenticatedError(
          fmt::format("the peer's certificate is not good for --cluster-ca: {}",
                      X509_verify_cert_error_string(X509_STORE_CTX_get_error(context.get()))));
    }
  }
  ERR_clear_error();
  sk_X509_free(others);
  return status;
}

x509_store_st* AuthorityCheck::Store() {
  const TlsTexts texts = files_->texts();
  if (store_ == nullptr || generation_ != texts.generation) {
    X509_STORE_free(store_);
    store_ = X509_STORE_new();
    for (const OwnedCertificate& ca : ParseAll(texts.ca)) X509_STORE_add_cert(store_, ca.get());
    generation_ = texts.generation;
  }
  return store_;
}

}  // namespace tandem
