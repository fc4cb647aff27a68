// The self-test of a link, over a link that tells its rate to a clock of its own.
#include "kvtransfer/channel/link_self_test.h"

#include <cstring>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/support/paths.h"

namespace tandem::kvtransfer {
namespace {

using ::testing::HasSubstr;

class SteppedClock : public Clock {
 public:
  absl::Time Now() override { return now; }
  absl::Time now = absl::FromUnixSeconds(1000);
};

struct LinkNature {
  double bytes_per_second = 1e9;
  absl::Duration latency = absl::Microseconds(20);
  ProbeRoom room = {size_t{1} << 20, 8};
  int damaged = -1;    // number of the PROBE of which a byte comes out wrong
  bool twice = false;  // answers come twice
};

// Both the connection and the writer of a link that needs the time that its nature says, and in
// which the answer to everything that was sent waits.
class ThrottledLink : public KvConnection, public KvWriter {
 public:
  explicit ThrottledLink(const LinkNature& nature) : nature_(nature) {}

  absl::Status Probe(FrameHeader header, ConstBytes pattern) override {
    EXPECT_LE(header.payload_bytes, nature_.room.frame_bytes);
    EXPECT_EQ(header.code, pattern.empty() ? 0u : 1u);
    if (!pattern.empty()) {
      EXPECT_EQ(header.payload_bytes, pattern.size());
    }
    clock.now += absl::Seconds(header.payload_bytes / nature_.bytes_per_second);
    moved += header.payload_bytes;
    std::vector<std::byte> came(pattern.begin(), pattern.end());
    if (static_cast<int>(header.ordinal_begin) == nature_.damaged) came.back() ^= std::byte{1};
    const uint64_t digest = pattern.empty() ? 0 : PayloadDigest(came);
    std::string payload(sizeof(digest), '\0');
    std::memcpy(payload.data(), &digest, sizeof(digest));
    FrameHeader ack;
    ack.type = FrameType::kProbeAck;
    ack.ordinal_begin = header.ordinal_begin;
    ack.payload_bytes = sizeof(digest);
    ack.payload_digest = PayloadDigest(std::as_bytes(std::span(payload)));
    for (int i = 0; i < (nature_.twice ? 2 : 1); ++i) acks_.emplace_back(ack, payload);
    EXPECT_LE(++unacknowledged_, nature_.room.frames);
    return absl::OkStatus();
  }
  ProbeRoom probe_room() const override { return nature_.room; }
  absl::StatusOr<std::unique_ptr<KvPost>> Post(const FrameHeader&, const BlockRun&,
                                               const std::string&) override {
    return absl::UnimplementedError("no blocks here");
  }

  absl::StatusOr<FrameHeader> ReceiveHeader(absl::Duration) override {
    if (acks_.empty()) return absl::DeadlineExceededError("nothing was sent");
    const auto [header, payload] = acks_.front();
    acks_.pop_front();
    payload_ = payload;
    if (!seen_.has_value() || *seen_ != header.ordinal_begin) --unacknowledged_;
    seen_ = header.ordinal_begin;
    // Only the last answer is waited for: those before it came while the next frame was sent.
    if (acks_.empty()) clock.now += nature_.latency;
    return header;
  }
  absl::StatusOr<size_t> ReceiveSome(std::span<const MutableBytes> into) override {
    std::memcpy(into[0].data(), payload_.data(), payload_.size());
    return payload_.size();
  }
  absl::Status WaitReadable(absl::Duration) override { return absl::OkStatus(); }
  absl::Status WaitReadableOrInterrupt(absl::Duration) override { return absl::OkStatus(); }
  absl::Status Send(const FrameHeader&, std::span<const ConstBytes>, absl::Duration) override {
    return absl::UnimplementedError("the writer sends");
  }
  void Interrupt() override {}
  void Shutdown() override {}
  const std::string& peer() const override { return peer_; }

  SteppedClock clock;
  size_t moved = 0;

 private:
  const LinkNature nature_;
  const std::string peer_ = "throttled";
  std::deque<std::pair<FrameHeader, std::string>> acks_;
  std::string payload_;  // of the header that was received last
  std::optional<uint32_t> seen_;
  size_t unacknowledged_ = 0;
};

absl::StatusOr<KvLinkTest> Measure(ThrottledLink* link,
                                   absl::Duration time = absl::Milliseconds(200)) {
  return TestLink(link, link, {.time = time, .clock = &link->clock});
}

TEST(LinkSelfTest, MeasuresRatesAndLatency) {
  ThrottledLink link({.bytes_per_second = 40e9, .latency = absl::Microseconds(20)});
  const auto test = Measure(&link);
  ASSERT_OK(test);
  EXPECT_NEAR(test->latency_seconds, 20e-6, 1e-7);
  EXPECT_NEAR(test->small_rate, 65536 / (65536 / 40e9 + 20e-6), 1e6);
  EXPECT_NEAR(test->medium_rate, 1048576 / (1048576 / 40e9 + 20e-6), 1e7);
  EXPECT_EQ(test->large_bytes, size_t{64} << 20);
  EXPECT_NEAR(test->large_rate, 40e9, 8e8);
  EXPECT_EQ(test->rate(), test->large_rate);
  EXPECT_LT(link.moved, kMaxProbedBytes / 2);
}

// The first request of a pair waits for it.
TEST(LinkSelfTest, TakesMillisecondsWhereTheLinkIsNotSlow) {
  for (const double rate : {100e9, 5e9, 3e9}) {
    ThrottledLink link({.bytes_per_second = rate, .latency = absl::Microseconds(50)});
    const absl::Time start = link.clock.now;
    ASSERT_OK(Measure(&link));
    EXPECT_LE(link.clock.now - start, absl::Milliseconds(10)) << rate;
  }
}

// Whatever the link: what a test takes is bounded, and what it says is the link's rate.
TEST(LinkSelfTest, ASlowLinkGetsWhatFitsTheTime) {
  for (const double rate : {1e12, 1e9, 125e6, 12.5e6, 4e6}) {
    for (const absl::Duration latency : {absl::Microseconds(5), absl::Milliseconds(10)}) {
      SCOPED_TRACE(testing::Message() << rate << " bytes/s, " << latency);
      ThrottledLink link({.bytes_per_second = rate, .latency = latency});
      const absl::Time start = link.clock.now;
      const auto test = Measure(&link);
      ASSERT_OK(test);
      EXPECT_LE(link.clock.now - start, absl::Milliseconds(250));
      EXPECT_LE(test->best_rate(), rate * 1.001);
      EXPECT_GT(test->rate(), 0);
      if (rate == 125e6 && latency < absl::Milliseconds(1)) {
        EXPECT_GT(test->large_bytes, size_t{4} << 20);
        EXPECT_LT(test->large_bytes, size_t{16} << 20);
        EXPECT_NEAR(test->rate(), rate, rate / 100);
      }
    }
  }
}

TEST(LinkSelfTest, AWrongByteAnywhereInThePatternIsDataLoss) {
  for (int damaged = 0; damaged < 4; ++damaged) {
    ThrottledLink link({.damaged = damaged});
    const auto test = Measure(&link);
    EXPECT_EQ(test.status().code(), absl::StatusCode::kDataLoss);
    EXPECT_THAT(test.status().ToString(), HasSubstr("pattern came out wrong"));
  }
}

TEST(LinkSelfTest, NeverHasMoreUnderWayThanThereIsRoomFor) {
  for (const ProbeRoom room :
       {ProbeRoom{size_t{256} << 10, 4}, ProbeRoom{4096, 1}, ProbeRoom{size_t{16} << 20, 2}}) {
    ThrottledLink link({.bytes_per_second = 10e9, .room = room});  // looks at each frame
    const auto test = Measure(&link);
    ASSERT_OK(test);
    EXPECT_GT(test->large_rate, 0);
  }
}

TEST(LinkSelfTest, AnswersThatComeTwiceAreTakenOnce) {
  ThrottledLink link({.twice = true});
  const auto test = Measure(&link);
  ASSERT_OK(test);
  EXPECT_NEAR(test->large_rate, 1e9, 1e8);
}

TEST(LinkSelfTest, WithoutTimeOnlyThePatternIsChecked) {
  ThrottledLink link({});
  const auto test = Measure(&link, absl::ZeroDuration());
  ASSERT_OK(test);
  EXPECT_EQ(*test, KvLinkTest{});
  ThrottledLink damaged({.damaged = 3});
  EXPECT_EQ(Measure(&damaged, absl::ZeroDuration()).status().code(), absl::StatusCode::kDataLoss);
}

}  // namespace
}  // namespace tandem::kvtransfer
