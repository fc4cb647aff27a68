// API keys: what a client of the public API shows, and what the router keeps of it.
//
// A key is drawn at random, never chosen by a person. So nobody finds it by guessing at its digest,
// and one round of SHA-256 is enough: the slow, salted hashes that passwords need protect texts
// that can be guessed. It also makes the lookup safe: how long the search for a digest takes says
// something about that digest, which tells nothing about the keys that would have other ones.
//
// Pure functions but for NewApiKey, thread-safe.
#pragma once

#include <string>
#include <string_view>

namespace tandem {

inline constexpr size_t kApiKeyDigestBytes = 32;

// "tdm-" and 256 random bits, as 43 characters that need no quotes anywhere.
std::string NewApiKey();

// SHA-256, kApiKeyDigestBytes bytes.
std::string ApiKeyDigest(std::string_view key);

// Of keys and tenants: 1 to 64 of A-Z a-z 0-9 . _ -, so that logs, labels and salts take them as
// they are.
bool IsKeyName(std::string_view name);

}  // namespace tandem
