#include "common/rpc/cluster_credentials.h"

#include <algorithm>
#include <functional>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_split.h"
#include "absl/synchronization/mutex.h"
#include "fmt/format.h"
#include "fmt/ranges.h"
#include "grpc/grpc_security_constants.h"
#include "grpcpp/security/tls_certificate_provider.h"
#include "grpcpp/security/tls_certificate_verifier.h"
#include "grpcpp/security/tls_credentials_options.h"
#include "spdlog/spdlog.h"

#include "common/base/log_limiter.h"
#include "common/base/mem_file.h"
#include "common/base/status.h"
#include "common/rpc/authority_check.h"
#include "common/rpc/status.h"
#include "openssl/bio.h"
#include "openssl/evp.h"
#include "openssl/pem.h"
#include "openssl/x509.h"
#include "openssl/x509v3.h"

namespace tandem {
namespace {

namespace tls = grpc::experimental;

template <typename T, void (*kFree)(T*)>
struct Freed {
  void operator()(T* object) const { kFree(object); }
};
using KeyPtr = std::unique_ptr<EVP_PKEY, Freed<EVP_PKEY, EVP_PKEY_free>>;
using CertificatePtr = std::unique_ptr<X509, Freed<X509, X509_free>>;
using BioPtr = std::unique_ptr<BIO, Freed<BIO, BIO_free_all>>;

// Nobody checks it: the proof says how long a certificate holds, which is as long as its key; one
// of an authority says it for the key that it has signed.
constexpr long kValidSeconds = 100L * 365 * 24 * 3600;
constexpr char kScheme[] = "tandem:";
// How often gRPC looks whether what it shows has changed.
constexpr unsigned kLookSeconds = 1;

// The public key as it stands in the certificate; "" if there is none.
std::string PublicKeyBytes(X509* certificate) {
  unsigned char* der = nullptr;
  const int size = i2d_X509_PUBKEY(X509_get_X509_PUBKEY(certificate), &der);
  if (size <= 0) return "";
  std::string bytes(reinterpret_cast<const char*>(der), static_cast<size_t>(size));
  OPENSSL_free(der);
  return bytes;
}

template <typename Write>
std::string ToPem(Write write) {
  const BioPtr bio(BIO_new(BIO_s_mem()));
  if (bio == nullptr || write(bio.get()) != 1) return "";
  char* data = nullptr;
  const long size = BIO_get_mem_data(bio.get(), &data);
  return {data, static_cast<size_t>(size)};
}

BioPtr Reader(std::string_view pem) {
  return BioPtr(BIO_new_mem_buf(pem.data(), static_cast<int>(pem.size())));
}

// What a certificate says of its holder, as the one URI among its names: tandem:ROLE/ID/PROOF, the
// last two in hex.
struct Claim {
  Party party;
  std::string proof;
};

std::string ClaimUri(const Claim& claim) {
  return fmt::format("{}{}/{}/{}", kScheme, claim.party.role,
                     absl::BytesToHexString(claim.party.id), absl::BytesToHexString(claim.proof));
}

std::optional<Claim> ParseClaim(std::string_view uri) {
  if (!uri.starts_with(kScheme)) return std::nullopt;
  uri.remove_prefix(sizeof(kScheme) - 1);
  if (uri.size() > 2 * (kMaxPartyIdBytes + kProofBytes) + 64) return std::nullopt;
  const std::vector<std::string> parts = absl::StrSplit(std::string(uri), '/');
  const auto is_hex = [](const std::string& text) {
    return text.size() % 2 == 0 && std::all_of(text.begin(), text.end(), absl::ascii_isxdigit);
  };
  if (parts.size() != 3 || !is_hex(parts[1]) || !is_hex(parts[2])) return std::nullopt;
  Claim claim{{parts[0], absl::HexStringToBytes(parts[1])}, absl::HexStringToBytes(parts[2])};
  if (!ValidateParty(claim.party).ok()) return std::nullopt;
  return claim;
}

std::string ProofOf(std::string_view secret, const Party& party, std::string_view public_key) {
  return Prove(secret, ProofPurpose::kRpcKey, {party.role, party.id, public_key});
}

// Looks at the certificate that the other end of a handshake has shown to be its own.
class ProofVerifier final : public tls::ExternalCertificateVerifier {
 public:
  // `id` empty: any. `authority` null: the secret alone decides.
  ProofVerifier(std::string secret, std::vector<std::string> roles, std::string id,
                std::shared_ptr<AuthorityCheck> authority)
      : secret_(std::move(secret)),
        roles_(std::move(roles)),
        id_(std::move(id)),
        authority_(std::move(authority)) {}

  bool Verify(tls::TlsCustomVerificationCheckRequest* request,
              std::function<void(grpc::Status)> /*callback*/, grpc::Status* status) override {
    const absl::Status checked = Check(*request);
    if (!checked.ok()) {
      if (limiter_.Allow()) {
        spdlog::warn("internal rpc refused: {}{}", MessageOf(checked), limiter_.Withheld());
      }
      *status = ToGrpcStatus(checked);
    }
    return true;
  }
  void Cancel(tls::TlsCustomVerificationCheckRequest* /*request*/) override {}

 private:
  absl::Status Check(const tls::TlsCustomVerificationCheckRequest& request) const {
    const std::vector<grpc::string_ref> uris = request.uri_names();
    if (uris.size() != 1) return Refusal();
    const std::optional<Claim> claim = ParseClaim({uris[0].data(), uris[0].size()});
    if (!claim.has_value()) return Refusal();
    const grpc::string_ref pem = request.peer_cert();
    const BioPtr bio = Reader({pem.data(), pem.size()});
    const CertificatePtr certificate(PEM_read_bio_X509(bio.get(), nullptr, nullptr, nullptr));
    if (certificate == nullptr) return Refusal();
    const std::string key = PublicKeyBytes(certificate.get());
    if (key.empty() || !CheckProof(secret_, ProofPurpose::kRpcKey,
                                   {claim->party.role, claim->party.id, key}, claim->proof)) {
      return Refusal();
    }
    if (authority_ != nullptr) {
      const grpc::string_ref chain = request.peer_cert_full_chain();
      TANDEM_RETURN_IF_ERROR(
          authority_->Check({pem.data(), pem.size()}, {chain.data(), chain.size()}));
    }
    // From here on it is one of the cluster's.
    if (std::find(roles_.begin(), roles_.end(), claim->party.role) == roles_.end()) {
      return PermissionDenied("a {} has no business here, only a {}", claim->party.role,
                              fmt::join(roles_, " or a "));
    }
    if (!id_.empty() && id_ != claim->party.id) {
      return PermissionDenied("the peer is {} '{}', not '{}'", claim->party.role,
                              absl::CEscape(claim->party.id), absl::CEscape(id_));
    }
    return absl::OkStatus();
  }

  static absl::Status Refusal() {
    return absl::UnauthenticatedError(
        "the peer does not prove the cluster secret (TANDEM_CLUSTER_SECRET must be the same)");
  }

  const std::string secret_;
  const std::vector<std::string> roles_;
  const std::string id_;
  const std::shared_ptr<AuthorityCheck> authority_;
  LogLimiter limiter_;
};

// gRPC's provider reads its files for as long as a server or a channel has it, and nobody is told
// how long that is. A process has three.
MemFile* KeepForGood(std::unique_ptr<MemFile> file) {
  static absl::Mutex mutex(absl::kConstInit);
  static auto* const kept = new std::vector<std::unique_ptr<MemFile>>();
  absl::MutexLock lock(&mutex);
  return kept->emplace_back(std::move(file)).get();
}

class ClusterCredentialsImpl final : public ClusterCredentials {
 public:
  ClusterCredentialsImpl(std::string secret, Party self,
                         std::shared_ptr<CertificateFiles> certificate)
      : secret_(std::move(secret)), self_(std::move(self)), certificate_(std::move(certificate)) {}
  ~ClusterCredentialsImpl() override {
    if (listener_ >= 0) certificate_->RemoveListener(listener_);
  }

  absl::Status Init() {
    key_.reset(EVP_EC_gen("P-256"));
    if (key_ == nullptr) return Internal("OpenSSL makes no key");
    const std::string private_pem = ToPem([&](BIO* bio) {
      return PEM_write_bio_PrivateKey(bio, key_.get(), nullptr, nullptr, 0, nullptr, nullptr);
    });
    TANDEM_ASSIGN_OR_RETURN(const std::string pem, MakeCertificate());
    // The roots, which nobody is compared with, are there or gRPC would look for the system's.
    if (certificate_ == nullptr) {
      provider_ = std::make_shared<tls::StaticDataCertificateProvider>(
          pem, std::vector<tls::IdentityKeyCertPair>{{private_pem, pem}});
      return absl::OkStatus();
    }
    authority_ = std::make_shared<AuthorityCheck>(certificate_);
    // Of gRPC's providers only the one that reads files takes a change.
    TANDEM_ASSIGN_OR_RETURN(std::unique_ptr<MemFile> key, MemFile::Create(private_pem));
    TANDEM_ASSIGN_OR_RETURN(std::unique_ptr<MemFile> root, MemFile::Create(pem));
    TANDEM_ASSIGN_OR_RETURN(std::unique_ptr<MemFile> chain, MemFile::Create(pem));
    const std::string chain_path = chain->path();
    chain_file_ = KeepForGood(std::move(chain));
    provider_ = std::make_shared<tls::FileWatcherCertificateProvider>(
        KeepForGood(std::move(key))->path(), chain_path, KeepForGood(std::move(root))->path(),
        kLookSeconds);
    listener_ = certificate_->AddListener([this] { Renew(); });
    Renew();  // it may have changed since it was looked at
    return absl::OkStatus();
  }

  const Party& self() const override { return self_; }

  std::shared_ptr<grpc::ServerCredentials> ForServer(
      std::vector<std::string> callers) const override {
    tls::TlsServerCredentialsOptions options(provider_);
    options.watch_root_certs();
    options.watch_identity_key_cert_pairs();
    options.set_cert_request_type(GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_BUT_DONT_VERIFY);
    options.set_certificate_verifier(MakeVerifier(std::move(callers), ""));
    return tls::TlsServerCredentials(options);
  }

  std::shared_ptr<grpc::ChannelCredentials> ForChannel(const Party& callee) const override {
    tls::TlsChannelCredentialsOptions options;
    options.set_certificate_provider(provider_);
    options.watch_root_certs();
    options.watch_identity_key_cert_pairs();
    options.set_verify_server_certs(false);
    options.set_check_call_host(false);
    options.set_certificate_verifier(MakeVerifier({callee.role}, callee.id));
    return tls::TlsCredentials(options);
  }

 private:
  // PEM text of a certificate of this process's key that says who it is: signed by the key of
  // `certificate_`, whose own follow, or by itself.
  absl::StatusOr<std::string> MakeCertificate() const {
    const TlsTexts texts = certificate_ != nullptr ? certificate_->texts() : TlsTexts();
    const CertificatePtr own(X509_new());
    X509* x509 = own.get();
    if (x509 == nullptr) return Internal("OpenSSL makes no certificate");
    X509_set_version(x509, X509_VERSION_3);
    ASN1_INTEGER_set(X509_get_serialNumber(x509), 1);
    // From the epoch, so that no clock is wrong.
    ASN1_TIME_set(X509_getm_notBefore(x509), 0);
    ASN1_TIME_set(X509_getm_notAfter(x509), kValidSeconds);
    X509_set_pubkey(x509, key_.get());
    const std::string uri =
        "URI:" + ClaimUri({self_, ProofOf(secret_, self_, PublicKeyBytes(x509))});
    X509_EXTENSION* names =
        X509V3_EXT_conf_nid(nullptr, nullptr, NID_subject_alt_name, uri.c_str());
    const bool added = names != nullptr && X509_add_ext(x509, names, -1) == 1;
    X509_EXTENSION_free(names);
    if (!added || !Sign(x509, texts)) return Internal("OpenSSL makes no certificate");
    return ToPem([&](BIO* bio) { return PEM_write_bio_X509(bio, x509); }) + texts.certificate;
  }

  bool Sign(X509* x509, const TlsTexts& texts) const {
    if (certificate_ == nullptr) return X509_sign(x509, key_.get(), EVP_sha256()) != 0;
    const BioPtr key_bio = Reader(texts.key);
    const KeyPtr key(PEM_read_bio_PrivateKey(key_bio.get(), nullptr, nullptr, nullptr));
    const BioPtr bio = Reader(texts.certificate);
    const CertificatePtr signer(PEM_read_bio_X509(bio.get(), nullptr, nullptr, nullptr));
    if (key == nullptr || signer == nullptr) return false;
    X509_set_issuer_name(x509, X509_get_subject_name(signer.get()));
    // Ed25519 and Ed448 have a digest of their own.
    int digest = NID_undef;
    const bool own_digest =
        EVP_PKEY_get_default_digest_nid(key.get(), &digest) == 2 && digest == NID_undef;
    return X509_sign(x509, key.get(), own_digest ? nullptr : EVP_sha256()) != 0;
  }

  void Renew() {
    absl::MutexLock lock(&renew_mutex_);
    const absl::StatusOr<std::string> pem = MakeCertificate();
    absl::Status status = pem.status();
    if (status.ok()) status = chain_file_->Replace(*pem);
    if (!status.ok()) spdlog::error("internal rpc: {}", MessageOf(status));
  }

  std::shared_ptr<tls::CertificateVerifier> MakeVerifier(std::vector<std::string> roles,
                                                         const std::string& id) const {
    return tls::ExternalCertificateVerifier::Create<ProofVerifier>(secret_, std::move(roles), id,
                                                                   authority_);
  }

  const std::string secret_;
  const Party self_;
  const std::shared_ptr<CertificateFiles> certificate_;  // null: the secret alone decides
  // Constant after Init.
  KeyPtr key_;
  std::shared_ptr<AuthorityCheck> authority_;
  MemFile* chain_file_ ABSL_PT_GUARDED_BY(renew_mutex_) = nullptr;
  std::shared_ptr<tls::CertificateProviderInterface> provider_;
  int listener_ = -1;
  absl::Mutex renew_mutex_;
};

}  // namespace

absl::StatusOr<std::shared_ptr<const ClusterCredentials>> ClusterCredentials::Make(
    std::string secret, Party self, std::shared_ptr<CertificateFiles> certificate) {
  TANDEM_RETURN_IF_ERROR(ValidateParty(self));
  auto credentials = std::make_shared<ClusterCredentialsImpl>(std::move(secret), std::move(self),
                                                              std::move(certificate));
  TANDEM_RETURN_IF_ERROR(credentials->Init());
  return credentials;
}

std::optional<Party> CallerOf(const grpc::AuthContext& context) {
  for (const grpc::string_ref& uri : context.FindPropertyValues(GRPC_PEER_URI_PROPERTY_NAME)) {
    // The verifier has let it in, so the claim is proved.
    if (std::optional<Claim> claim = ParseClaim({uri.data(), uri.size()})) return claim->party;
  }
  return std::nullopt;
}

}  // namespace tandem
