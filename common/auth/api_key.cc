#include "common/auth/api_key.h"

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"

#include "common/base/hmac.h"
#include "common/base/transfer_id.h"

namespace tandem {
namespace {

constexpr size_t kRandomBytes = 32;
constexpr size_t kMaxNameBytes = 64;

}  // namespace

std::string NewApiKey() {
  std::string text = absl::WebSafeBase64Escape(RandomBytes(kRandomBytes));
  while (text.ends_with('=')) text.pop_back();
  return "tdm-" + text;
}

std::string ApiKeyDigest(std::string_view key) { return Sha256(key); }

bool IsKeyName(std::string_view name) {
  return !name.empty() && name.size() <= kMaxNameBytes &&
         std::all_of(name.begin(), name.end(), [](unsigned char c) {
           return absl::ascii_isalnum(c) || c == '.' || c == '_' || c == '-';
         });
}

}  // namespace tandem
