#include "common/text/byte_level.h"

#include <array>

#include "common/text/utf8.h"

namespace tandem {
namespace {

constexpr uint32_t kSymbolsEnd = 0x144;  // one past the last character of the alphabet

struct Alphabet {
  std::array<uint16_t, 256> symbol_of_byte{};
  std::array<int16_t, kSymbolsEnd> byte_of_symbol{};
};

constexpr Alphabet MakeAlphabet() {
  Alphabet alphabet;
  for (auto& byte : alphabet.byte_of_symbol) byte = -1;
  uint16_t next = 0x100;
  for (int byte = 0; byte < 256; ++byte) {
    const bool itself = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) ||
                        (byte >= 0xAE && byte <= 0xFF);
    const uint16_t symbol = itself ? static_cast<uint16_t>(byte) : next++;
    alphabet.symbol_of_byte[byte] = symbol;
    alphabet.byte_of_symbol[symbol] = static_cast<int16_t>(byte);
  }
  return alphabet;
}

constexpr Alphabet kAlphabet = MakeAlphabet();

}  // namespace

std::string ByteSymbol(uint8_t byte) {
  std::string symbol;
  AppendCodePoint(kAlphabet.symbol_of_byte[byte], &symbol);
  return symbol;
}

std::optional<std::string> BytesOfSymbols(std::string_view token) {
  std::string bytes;
  for (size_t pos = 0; pos < token.size();) {
    const uint32_t symbol = NextCodePoint(token, &pos);
    if (symbol >= kSymbolsEnd || kAlphabet.byte_of_symbol[symbol] < 0) return std::nullopt;
    bytes.push_back(static_cast<char>(kAlphabet.byte_of_symbol[symbol]));
  }
  return bytes;
}

}  // namespace tandem
