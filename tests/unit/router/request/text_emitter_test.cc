#include "router/request/text_emitter.h"

#include "gtest/gtest.h"

#include "common/text/utf8.h"
#include "tests/support/paths.h"

namespace tandem::router {
namespace {

std::shared_ptr<const Tokenizer> DemoTokenizer() {
  auto tokenizer = Tokenizer::Load(SourcePath("models/demo/tokenizer.json"));
  EXPECT_OK(tokenizer);
  return *std::move(tokenizer);
}

// The text of an answer that ends with each token of `text` in turn, because no more were asked
// for.
void ExpectWholeCharacters(const std::string& text, const std::vector<std::string>& stops) {
  const auto tokenizer = DemoTokenizer();
  std::vector<int32_t> ids;
  ASSERT_OK(tokenizer->Encode(text, /*parse_special=*/false, &ids));
  ASSERT_GT(ids.size(), 6u) << "some characters take several tokens";
  for (size_t length = 1; length <= ids.size(); ++length) {
    auto emitter = TextEmitter::Create(tokenizer, stops, 0);
    ASSERT_OK(emitter);
    std::string out;
    for (size_t i = 0; i < length; ++i) out += emitter->Push(ids[i]).text;
    out += emitter->Flush();
    EXPECT_EQ(out, text.substr(0, out.size())) << "after " << length << " tokens";
    EXPECT_EQ(FindInvalidUtf8(out), std::nullopt) << "after " << length << " tokens";
    if (length == ids.size()) {
      EXPECT_EQ(out, text);
    }
  }
}

TEST(TextEmitter, ACharacterThatTheEndCutsIsLeftOut) {
  ExpectWholeCharacters("ab 你好世界", {});
  ExpectWholeCharacters("ab 你好世界", {"世界人"});
}

}  // namespace
}  // namespace tandem::router
