// libFuzzer: the first byte says whether the rest is a tokenizer.json, a text for a fixed
// tokenizer, or another file or field that strangers write. Nothing may crash; what is accepted
// must work.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "common/base/check.h"
#include "common/text/chat_template.h"
#include "common/text/detokenizer.h"
#include "common/text/generation_config.h"
#include "common/text/json.h"
#include "common/text/normalize.h"
#include "common/text/tokenizer.h"
#include "common/text/utf8.h"

namespace tandem {
namespace {

std::string FixtureJson() {
  const char* root = std::getenv("TANDEM_SOURCE_DIR");
  std::ifstream file(std::string(root == nullptr ? "." : root) + "/tests/data/text/tokenizer.json");
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

void RoundTrip(const Tokenizer& tokenizer, std::string_view text) {
  std::vector<int32_t> ids;
  const bool ok = tokenizer.Encode(text, /*parse_special=*/true, &ids).ok();
  TANDEM_CHECK(ok || ids.empty());
  IncrementalDetokenizer detokenizer(
      std::shared_ptr<const Tokenizer>(&tokenizer, [](const Tokenizer*) {}), false);
  std::string joined;
  for (const int32_t id : ids) joined += detokenizer.Push(id);
  joined += detokenizer.Flush();
  TANDEM_CHECK(joined == tokenizer.Decode(ids, false));
}

void FuzzText(std::string_view text) {
  static const auto* const tokenizer =
      new std::shared_ptr<const Tokenizer>(Tokenizer::Parse(FixtureJson()).value());
  RoundTrip(**tokenizer, text);
  std::vector<int32_t> ids;
  if ((*tokenizer)->Encode(text, /*parse_special=*/false, &ids).ok()) {
    TANDEM_CHECK((*tokenizer)->Decode(ids, true) == (*tokenizer)->Decode(ids, false),
                 "text that is not parsed gave a special token");
  }
  const auto once = NormalizePrompt(text);
  if (once.ok()) TANDEM_CHECK(NormalizePrompt(*once).value() == *once);
}

void FuzzChatTemplate(std::string_view source) {
  const auto chat = ChatTemplate::FromJinja(source, {{"bos_token", "<s>"}});
  if (!chat.ok()) return;
  const std::vector<ChatMessage> messages = {{.role = "user", .content = "a"},
                                             {.role = "assistant", .content = "<think>b</think>c"}};
  (void)chat->Render(messages, {}, true);
}

}  // namespace
}  // namespace tandem

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace tandem;
  if (size == 0) return 0;
  const std::string_view input(reinterpret_cast<const char*>(data) + 1, size - 1);
  switch (data[0] % 5) {
    case 0: {
      const auto tokenizer = Tokenizer::Parse(input);
      if (tokenizer.ok()) RoundTrip(**tokenizer, "The caf\xC3\xA9 <|im_end|> 12\n");
      break;
    }
    case 1:
      FuzzText(input);
      break;
    case 2:
      (void)ChatTemplate::FromTokenizerConfig(input);
      FuzzChatTemplate(input);
      break;
    case 3:
      (void)ParseGenerationConfig(input);
      break;
    default: {
      const auto once = ToPythonJson(input, "field");
      if (once.ok()) TANDEM_CHECK(ToPythonJson(*once, "field").value() == *once);
    }
  }
  return 0;
}
