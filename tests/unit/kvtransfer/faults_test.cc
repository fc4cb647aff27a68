// Both ends over a network that damages frames: a transfer is sealed with the right bytes, or
// fails cleanly; never sealed wrong, never hanging, and the next transfer over the same blocks
// succeeds.
#include <atomic>
#include <random>
#include <tuple>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "kvtransfer/transport/faulty_network.h"
#include "tests/support/paths.h"
#include "tests/unit/kvtransfer/endpoint_fixture.h"

namespace tandem::kvtransfer {
namespace {

// Ends whose timeouts are short, so that a fault that only a timeout can notice is noticed soon.
struct FaultyEnds : Ends {
  FaultyEnds(const std::string& transport, FaultScript script)
      : Ends(transport), network(MakeFaultyNetwork(TcpNetwork(), std::move(script))) {
    receiver_options.network = network.get();
    receiver_options.auth_timeout = kPatience;
    receiver_options.io_timeout = absl::Milliseconds(500);
    receiver_options.incomplete_timeout = absl::Milliseconds(100);
    receiver_options.quiet_timeout = absl::Milliseconds(200);
    sender_options.network = network.get();
    sender_options.connect_timeout = absl::Milliseconds(500);
    sender_options.io_timeout = absl::Milliseconds(500);
  }
  ~FaultyEnds() {
    sender.reset();
    receiver.reset();
  }

  // Nothing is lost: whoever waits for longer waits for a busy machine.
  void BePatient() {
    receiver_options.io_timeout = kPatience;
    receiver_options.incomplete_timeout = kPatience;
    sender_options.connect_timeout = kPatience;
    sender_options.io_timeout = kPatience;
  }

  // One transfer as workers do it: when the sender is done, however, the receiver gives up unless
  // it was sealed. Returns whether it was.
  bool Ship(uint64_t epoch, const std::vector<int32_t>& from, const std::vector<int32_t>& to) {
    const TransferId id = TransferId::Random();
    EXPECT_OK(sender->Open(Expect(id, epoch, to)));
    // Pairs of blocks, so that there are several DATA frames per layer.
    for (int layer = 0; layer < source.region().layout.num_layers; ++layer) {
      for (size_t i = 0; i < from.size(); i += 2) {
        std::vector<int32_t> ordinals;
        for (size_t k = i; k < std::min(i + 2, from.size()); ++k) {
          ordinals.push_back(static_cast<int32_t>(k));
        }
        sender->Push(id, epoch, layer, std::span(from).subspan(i, ordinals.size()), ordinals);
      }
    }
    sender->Finish(id, epoch);
    const Record::Sender sent = record.AwaitDone(id, epoch);
    receiver->Cancel(id, epoch);
    const Record::Receiver got = record.AwaitQuiet(id, epoch);
    EXPECT_EQ(sent.done, 1);
    EXPECT_EQ(got.quiet, 1);
    EXPECT_LE(got.sealed + got.failed, 1);
    if (got.sealed > 0) ExpectEqualBlocks(from, to);
    // OK at the sender means sealed at the receiver, never the other way round by mistake.
    if (sent.status.ok()) {
      EXPECT_EQ(got.sealed, 1);
    }
    return got.sealed == 1;
  }

  std::unique_ptr<KvNetwork> network;
};

const std::vector<int32_t> kFrom = {1, 2, 3, 10, 11, 20};
const std::vector<int32_t> kTo = {5, 6, 30, 31, 0, 1};
constexpr int kTries = 5;

// The n-th frame of a type.
using FaultCase = std::tuple<std::string, Fault, FrameType, int>;

class KvFaults : public ::testing::TestWithParam<FaultCase> {};

TEST_P(KvFaults, SealedRightOrFailedCleanly) {
  const auto [transport, fault, type, nth] = GetParam();
  std::atomic<int> seen{0};
  FaultyEnds ends(transport,
                  [&, fault = fault, type = type, nth = nth](const FrameHeader& header, uint64_t) {
                    return header.type == type && seen++ == nth ? fault : Fault::kNone;
                  });
  // Over nccl a small frame is over when its reader has taken it, so the one that is to overtake
  // it never leaves.
  const bool overtaken =
      fault == Fault::kReorder && type == FrameType::kData && transport != "nccl";
  const bool harmless = type != FrameType::kHelloOk &&
                        (fault == Fault::kDuplicate || fault == Fault::kDelay || overtaken);
  if (harmless) ends.BePatient();
  ends.Start();
  // Where the machine holds one end up for longer than the other waits, a transfer ends before the
  // fault is met: then a later one meets it.
  uint64_t epoch = 0;
  bool sealed = false;
  for (int tries = 0; seen <= nth && tries < kTries; ++tries) {
    sealed = ends.Ship(++epoch, kFrom, kTo);
  }
  EXPECT_GT(seen, nth) << "the fault was never met";
  const bool damages_data = type == FrameType::kData || type == FrameType::kFinish;
  // One-sided bytes do not travel in the frame.
  const bool has_payload = type == FrameType::kFinish || transport == "tcp";
  if (damages_data && has_payload && fault == Fault::kCorruptPayload) {
    EXPECT_FALSE(sealed);
  }
  if (damages_data && fault == Fault::kDrop) {
    EXPECT_FALSE(sealed);
  }
  if (harmless) {
    EXPECT_TRUE(sealed);
  }
  // The channel recovers: a few attempts see the old connection die.
  bool recovered = false;
  for (int tries = 0; !recovered && tries < kTries; ++tries) {
    recovered = ends.Ship(++epoch, kFrom, kTo);
  }
  EXPECT_TRUE(recovered);
}

INSTANTIATE_TEST_SUITE_P(
    Frames, KvFaults,
    ::testing::Combine(::testing::Values("tcp", "shm", "cuda_ipc", "shm_ring", "nccl"),
                       ::testing::Values(Fault::kDrop, Fault::kDuplicate, Fault::kReorder,
                                         Fault::kCorruptPayload, Fault::kCorruptHeader,
                                         Fault::kDelay, Fault::kTruncate, Fault::kKill),
                       ::testing::Values(FrameType::kHello, FrameType::kHelloOk, FrameType::kSelect,
                                         FrameType::kSelected, FrameType::kOpen, FrameType::kFinish,
                                         FrameType::kResult),
                       ::testing::Values(0)));
INSTANTIATE_TEST_SUITE_P(
    Data, KvFaults,
    ::testing::Combine(::testing::Values("tcp", "shm", "cuda_ipc", "shm_ring", "nccl"),
                       ::testing::Values(Fault::kDrop, Fault::kDuplicate, Fault::kReorder,
                                         Fault::kCorruptPayload, Fault::kCorruptHeader,
                                         Fault::kDelay, Fault::kTruncate, Fault::kKill),
                       ::testing::Values(FrameType::kData), ::testing::Values(0, 4, 8)));

// Bytes that come out wrong when the two connect: nothing is ever shipped over such a link.
TEST(KvFaultsOfTheSelfTest, AWrongByteRefusesTheLink) {
  std::atomic<bool> damaging{true};
  FaultyEnds ends("tcp", [&](const FrameHeader& header, uint64_t) {
    return damaging && header.type == FrameType::kProbe ? Fault::kCorruptPayload : Fault::kNone;
  });
  ends.BePatient();
  ends.Start();
  const TransferId id = TransferId::Random();
  EXPECT_OK(ends.sender->Open(ends.Expect(id, 1, kTo)));
  const Record::Sender sent = ends.record.AwaitDone(id, 1);
  EXPECT_EQ(sent.status.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(sent.status.ToString(),
              ::testing::HasSubstr("the link from prefill-0 to decode-0 over tcp fails its "
                                   "self-test: the self-test's pattern came out wrong"));
  const std::map<std::string, KvLink> links = ends.sender->Links();
  ASSERT_EQ(links.size(), 1u);
  EXPECT_TRUE(links.at("decode-0").refused);
  EXPECT_THAT(links.at("decode-0").note, ::testing::HasSubstr("over tcp fails its self-test"));
  ends.receiver->Cancel(id, 1);
  ends.record.AwaitQuiet(id, 1);
  // The next transfer tries again.
  damaging = false;
  EXPECT_TRUE(ends.Ship(2, kFrom, kTo));
  EXPECT_FALSE(ends.sender->Links().at("decode-0").refused);
}

class KvFaultsRandom : public ::testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(Transports, KvFaultsRandom,
                         ::testing::Values("tcp", "shm", "cuda_ipc", "shm_ring", "nccl"));

TEST_P(KvFaultsRandom, ManyTransfersOverABadLink) {
  constexpr Fault kFaults[] = {Fault::kDrop,           Fault::kDuplicate, Fault::kReorder,
                               Fault::kCorruptPayload, Fault::kDelay,     Fault::kCorruptHeader,
                               Fault::kTruncate,       Fault::kKill};
  std::mt19937_64 script_random(11);
  FaultyEnds ends(GetParam(), [&](const FrameHeader&, uint64_t) {
    return script_random() % 100 < 4 ? kFaults[script_random() % std::size(kFaults)] : Fault::kNone;
  });
  ends.Start();
  std::mt19937_64 random(12);
  int sealed = 0;
  for (uint64_t epoch = 1; epoch <= 60; ++epoch) {
    const size_t count = 1 + random() % 8;
    const auto from = RandomBlocks(&random, 32, count);
    const auto to = RandomBlocks(&random, 40, count);
    ends.target.Fill(std::byte{0x5a});
    sealed += ends.Ship(epoch, from, to) ? 1 : 0;
  }
  EXPECT_GT(sealed, 5);
  EXPECT_LT(sealed, 60);
}

}  // namespace
}  // namespace tandem::kvtransfer
