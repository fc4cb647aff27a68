// GPT-2's byte-level alphabet: each byte is written as one printable character, so that token
// strings in tokenizer.json are plain text ("Ġthe" is " the").
//
// Pure functions, thread-safe. Source: the table of OpenAI's GPT-2 encoder: bytes 0x21..0x7E,
// 0xA1..0xAC and 0xAE..0xFF stand for themselves, the other 68, in order, for U+0100, U+0101, ...
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace tandem {

// The character that stands for `byte`, in UTF-8.
std::string ByteSymbol(uint8_t byte);

// The bytes that `token` (valid UTF-8) stands for, or nullopt if some character of it is not of the
// alphabet.
std::optional<std::string> BytesOfSymbols(std::string_view token);

}  // namespace tandem
