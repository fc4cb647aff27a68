#include "common/text/nfc.h"

#include <cstdlib>
#include <string>
#include <utf8proc.h>

#include "gtest/gtest.h"

#include "common/text/utf8.h"

namespace tandem {
namespace {

TEST(NfcTest, ComposesAndOrdersMarks) {
  EXPECT_EQ(ToNfc("e\u0301"), "\u00E9");
  EXPECT_EQ(ToNfc("\u212B"), "\u00C5");               // Angstrom sign
  EXPECT_EQ(ToNfc("\u0958"), "\u0915\u093C");         // composition exclusion
  EXPECT_EQ(ToNfc("\u1100\u1161\u11A8"), "\uAC01");   // Hangul L V T
  EXPECT_EQ(ToNfc("\uAC00\u11A8"), "\uAC01");         // LV T
  EXPECT_EQ(ToNfc("a\u0301\u0316"), "\u00E1\u0316");  // blocked by nothing: lower class first
  EXPECT_EQ(ToNfc("a\u0316\u0301"), "\u00E1\u0316");
  EXPECT_EQ(ToNfc("\u1F00\u0300\u0345"), "\u1F82");  // three steps
  EXPECT_EQ(ToNfc("q\u0307\u0323"), "q\u0323\u0307");
  EXPECT_EQ(ToNfc("\u0301abc"), "\u0301abc");
  EXPECT_EQ(ToNfc(""), "");
}

TEST(NfcTest, MarksNewerThanHuggingFacesTablesBlockComposition) {
  EXPECT_EQ(ToNfc("e\u1ABF\u0301"),
            "e\u1ABF\u0301");  // class 220 in Unicode 13; e would compose over it
  EXPECT_EQ(ToNfc("\U00011935\U00011930"), "\U00011935\U00011930");
  EXPECT_EQ(ToNfc("\U00011938"), "\U00011938");
}

TEST(NfcTest, EqualsUtf8procForEveryCharacter) {
  for (uint32_t c = 1; c < 0x110000; ++c) {
    if (c >= 0xD800 && c < 0xE000) continue;
    std::string text;
    AppendCodePoint(c, &text);
    utf8proc_uint8_t* expected = nullptr;
    const auto size =
        utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
                     static_cast<utf8proc_ssize_t>(text.size()), &expected,
                     static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
    ASSERT_GT(size, 0);
    const std::string want(reinterpret_cast<char*>(expected), size);
    std::free(expected);
    ASSERT_EQ(ToNfc(text), want) << std::hex << c;
    if (IsSurelyNfc(text)) {
      ASSERT_EQ(text, want) << std::hex << c;
    }
  }
}

TEST(NfcTest, ReportsWhatChanged) {
  std::vector<NfcChange> changes;
  EXPECT_EQ(ToNfc("xye\u0301z\u212B!", &changes), "xy\u00E9z\u00C5!");
  ASSERT_EQ(changes.size(), 2u);
  EXPECT_EQ(changes[0].in_begin, 2u);
  EXPECT_EQ(changes[0].in_end, 5u);
  EXPECT_EQ(changes[0].out_begin, 2u);
  EXPECT_EQ(changes[0].out_end, 4u);
  EXPECT_EQ(changes[1].in_end, 9u);
  EXPECT_EQ(changes[1].out_end, 7u);
}

TEST(NfcTest, LongRunsOfMarksAreOrderedStably) {
  std::string text = "x";
  for (int i = 0; i < 20'000; ++i) text += i % 2 == 0 ? "\u0301" : "\u0316";
  std::string want = "x";
  for (int i = 0; i < 10'000; ++i) want += "\u0316";
  for (int i = 0; i < 10'000; ++i) want += "\u0301";
  EXPECT_EQ(ToNfc(text), want);
}

TEST(NfcTest, PlainTextIsRecognised) {
  EXPECT_TRUE(IsSurelyNfc("plain \u00E9 \u4E2D\u6587 \uAC00 \U0001F600"));
  EXPECT_FALSE(IsSurelyNfc("e\u0301"));
}

}  // namespace
}  // namespace tandem
