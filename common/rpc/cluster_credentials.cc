#include "common/rpc/cluster_credentials.h"

#include <algorithm>
#include <functional>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_split.h"
#include "fmt/format.h"
#include "fmt/ranges.h"
#include "grpc/grpc_security_constants.h"
#include "grpcpp/security/tls_certificate_provider.h"
#include "grpcpp/security/tls_certificate_verifier.h"
#include "grpcpp/security/tls_credentials_options.h"
#include "spdlog/spdlog.h"

#include "common/base/log_limiter.h"
#include "common/base/status.h"
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

// Nobody checks it: the proof says how long a certificate holds, which is as long as its key.
constexpr long kValidSeconds = 100L * 365 * 24 * 3600;
constexpr char kScheme[] = "tandem:";

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
  // `id` empty: any.
  ProofVerifier(std::string secret, std::vector<std::string> roles, std::string id)
      : secret_(std::move(secret)), roles_(std::move(roles)), id_(std::move(id)) {}

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
    const BioPtr bio(BIO_new_mem_buf(pem.data(), static_cast<int>(pem.size())));
    const CertificatePtr certificate(PEM_read_bio_X509(bio.get(), nullptr, nullptr, nullptr));
    if (certificate == nullptr) return Refusal();
    const std::string key = PublicKeyBytes(certificate.get());
    if (key.empty() || !CheckProof(secret_, ProofPurpose::kRpcKey,
                                   {claim->party.role, claim->party.id, key}, claim->proof)) {
      return Refusal();
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
  LogLimiter limiter_;
};

class ClusterCredentialsImpl final : public ClusterCredentials {
 public:
  ClusterCredentialsImpl(std::string secret, Party self)
      : secret_(std::move(secret)), self_(std::move(self)) {}

  absl::Status Init() {
    const KeyPtr key(EVP_EC_gen("P-256"));
    const CertificatePtr certificate(X509_new());
    if (key == nullptr || certificate == nullptr) return Internal("OpenSSL makes no key");
    X509* x509 = certificate.get();
    X509_set_version(x509, X509_VERSION_3);
    ASN1_INTEGER_set(X509_get_serialNumber(x509), 1);
    // From the epoch, so that no clock is wrong.
    ASN1_TIME_set(X509_getm_notBefore(x509), 0);
    ASN1_TIME_set(X509_getm_notAfter(x509), kValidSeconds);
    X509_set_pubkey(x509, key.get());
    const std::string uri =
        "URI:" + ClaimUri({self_, ProofOf(secret_, self_, PublicKeyBytes(x509))});
    X509_EXTENSION* names =
        X509V3_EXT_conf_nid(nullptr, nullptr, NID_subject_alt_name, uri.c_str());
    const bool added = names != nullptr && X509_add_ext(x509, names, -1) == 1;
    X509_EXTENSION_free(names);
    if (!added || X509_sign(x509, key.get(), EVP_sha256()) == 0) {
      return Internal("OpenSSL makes no certificate");
    }
    const std::string pem = ToPem([&](BIO* bio) { return PEM_write_bio_X509(bio, x509); });
    const std::string private_pem = ToPem([&](BIO* bio) {
      return PEM_write_bio_PrivateKey(bio, key.get(), nullptr, nullptr, 0, nullptr, nullptr);
    });
    // As its own root, which nobody is compared with: or gRPC would look for the system's.
    provider_ = std::make_shared<tls::StaticDataCertificateProvider>(
        pem, std::vector<tls::IdentityKeyCertPair>{{private_pem, pem}});
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
  std::shared_ptr<tls::CertificateVerifier> MakeVerifier(std::vector<std::string> roles,
                                                         const std::string& id) const {
    return tls::ExternalCertificateVerifier::Create<ProofVerifier>(secret_, std::move(roles), id);
  }

  const std::string secret_;
  const Party self_;
  std::shared_ptr<tls::StaticDataCertificateProvider> provider_;
};

}  // namespace

absl::StatusOr<std::shared_ptr<const ClusterCredentials>> ClusterCredentials::Make(
    std::string secret, Party self) {
  TANDEM_RETURN_IF_ERROR(ValidateParty(self));
  auto credentials = std::make_shared<ClusterCredentialsImpl>(std::move(secret), std::move(self));
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
