#include "common/base/hmac.h"

#include <cstdint>

#include "common/base/check.h"
#include "openssl/crypto.h"
#include "openssl/evp.h"
#include "openssl/hmac.h"

namespace tandem {

std::string Sha256(std::string_view message) {
  std::string out(EVP_MAX_MD_SIZE, '\0');
  unsigned int size = 0;
  const int done =
      EVP_Digest(message.data(), message.size(), reinterpret_cast<unsigned char*>(out.data()),
                 &size, EVP_sha256(), nullptr);
  TANDEM_CHECK(done == 1 && size == 32, "SHA-256 failed");
  out.resize(size);
  return out;
}

std::string HmacSha256(std::string_view key, std::string_view message) {
  std::string out(EVP_MAX_MD_SIZE, '\0');
  unsigned int size = 0;
  const auto* bytes = reinterpret_cast<const unsigned char*>(message.data());
  const unsigned char* done =
      HMAC(EVP_sha256(), key.empty() ? "" : key.data(), static_cast<int>(key.size()), bytes,
           message.size(), reinterpret_cast<unsigned char*>(out.data()), &size);
  TANDEM_CHECK(done != nullptr && size == 32, "HMAC-SHA256 failed");
  out.resize(size);
  return out;
}

void AppendWithLength(std::string_view part, std::string* out) {
  const uint64_t size = part.size();
  out->append(reinterpret_cast<const char*>(&size), sizeof(size));
  out->append(part);
}

bool EqualInConstantTime(std::string_view a, std::string_view b) {
  return a.size() == b.size() && CRYPTO_memcmp(a.data(), b.data(), a.size()) == 0;
}

}  // namespace tandem
