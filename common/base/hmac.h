// SHA-256 and HMAC-SHA256 (OpenSSL's) and what goes with them. Pure functions, thread-safe.
#pragma once

#include <string>
#include <string_view>

namespace tandem {

// 32 bytes, both.
std::string Sha256(std::string_view message);
std::string HmacSha256(std::string_view key, std::string_view message);

// Length and bytes, so that ("ab", "c") and ("a", "bc") give different messages.
void AppendWithLength(std::string_view part, std::string* out);

// Takes as long wherever two texts of the same length differ.
bool EqualInConstantTime(std::string_view a, std::string_view b);

}  // namespace tandem
