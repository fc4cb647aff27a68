#include "kvtransfer/transport/frame.h"

#include <cstring>
#include <random>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/support/paths.h"

namespace tandem::kvtransfer {
namespace {

using ::testing::HasSubstr;

FrameHeader DataHeader() {
  FrameHeader header;
  header.type = FrameType::kData;
  header.id = TransferId{Hash128{0x0102030405060708, 0x1112131415161718}};
  header.epoch = 9;
  header.ordinal_begin = 3;
  header.ordinal_count = 4;
  header.layer_begin = 5;
  header.layer_count = 1;
  header.head_begin = 2;
  header.head_count = 6;
  header.payload_bytes = 4096;
  return header;
}

TEST(Frame, RoundTrip) {
  FrameHeader header = DataHeader();
  EXPECT_EQ(*DecodeHeader(EncodeHeader(header)), header);
  header.type = FrameType::kResult;
  header.code = 15;
  header.payload_digest = 0xfedcba9876543210;
  EXPECT_EQ(*DecodeHeader(EncodeHeader(header)), header);
}

TEST(Frame, EveryFlippedBitIsNoticed) {
  const EncodedHeader good = EncodeHeader(DataHeader());
  for (size_t bit = 0; bit < 8 * kFrameHeaderBytes; ++bit) {
    EncodedHeader bad = good;
    bad[bit / 8] ^= static_cast<std::byte>(1u << (bit % 8));
    EXPECT_FALSE(DecodeHeader(bad).ok()) << bit;
  }
}

TEST(Frame, RandomBytesAreNoFrame) {
  std::mt19937_64 random(3);
  for (int i = 0; i < 1000; ++i) {
    EncodedHeader bytes;
    for (std::byte& b : bytes) b = static_cast<std::byte>(random());
    EXPECT_FALSE(DecodeHeader(bytes).ok());
  }
}

TEST(Frame, FieldsOutOfRangeAreRefused) {
  const auto error = [](const FrameHeader& header) {
    return DecodeHeader(EncodeHeader(header)).status().ToString();
  };
  FrameHeader header = DataHeader();
  header.payload_bytes = kMaxDataPayload + 1;
  EXPECT_THAT(error(header), HasSubstr("DATA frame of"));
  header = DataHeader();
  header.type = FrameType::kOpen;
  EXPECT_THAT(error(header), HasSubstr("OPEN frame of 4096 bytes, more than 32"));
  header = DataHeader();
  header.type = static_cast<FrameType>(99);
  EXPECT_THAT(error(header), HasSubstr("unknown KV frame type 99"));
  header = DataHeader();
  header.ordinal_begin = 0xffffffff;
  EXPECT_THAT(error(header), HasSubstr("out of range"));
  header = DataHeader();
  header.layer_count = kMaxLayers + 1;
  EXPECT_THAT(error(header), HasSubstr("out of range"));
  header = DataHeader();
  header.head_count = kMaxHeads + 1;
  EXPECT_THAT(error(header), HasSubstr("out of range"));
  header = DataHeader();
  header.code = 17;
  EXPECT_THAT(error(header), HasSubstr("status code 17"));
}

TEST(Frame, AnotherVersionIsNamed) {
  EncodedHeader bytes = EncodeHeader(DataHeader());
  bytes[4] = std::byte{9};
  const auto decoded = DecodeHeader(bytes);
  EXPECT_EQ(decoded.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(decoded.status().ToString(), HasSubstr("KV protocol version: here 4, peer 9"));
}

}  // namespace
}  // namespace tandem::kvtransfer
