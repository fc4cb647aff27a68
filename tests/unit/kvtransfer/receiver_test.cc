// The receiver against a sender that the test speaks for, frame by frame: what no well-behaved
// sender would ever show. Over each transport, as far as the transport has to do with it.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <filesystem>
#include <iterator>
#include <memory>
#include <sstream>
#include <thread>
#include <vector>

#include "absl/synchronization/notification.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "spdlog/sinks/ostream_sink.h"
#include "spdlog/spdlog.h"

#include "kvtransfer/channel/link_self_test.h"
#include "tests/support/paths.h"
#include "tests/unit/kvtransfer/endpoint_fixture.h"
#include "tests/unit/kvtransfer/speaker.h"

namespace tandem::kvtransfer {
namespace {

using ::testing::HasSubstr;

class KvReceiverTest : public ::testing::Test {
 protected:
  explicit KvReceiverTest(const std::string& transport = "tcp") : ends_(transport) {}

  static constexpr uint32_t kLayers = 3;

  void SetUp() override { ends_.target.Fill(std::byte{0xee}); }
  void Start() { ends_.StartReceiver(); }
  void ExpectUntouched(const std::vector<int32_t>& blocks) const {
    for (const int32_t block : blocks) {
      EXPECT_EQ(ends_.target.BlockBytes(block), std::string(SmallLayout().BlockBytes(), '\xee'));
    }
  }
  KvReceiverOptions& options() { return ends_.receiver_options; }

  Ends ends_;
  const TransferId id_ = TransferId::Random();
};

// What holds whoever writes the bytes.
class KvReceiverOver : public KvReceiverTest, public ::testing::WithParamInterface<std::string> {
 protected:
  KvReceiverOver() : KvReceiverTest(GetParam()) {}
};
INSTANTIATE_TEST_SUITE_P(Transports, KvReceiverOver, ::testing::Values("tcp", "shm"),
                         [](const auto& info) { return info.param; });

TEST_F(KvReceiverTest, RefusesAnotherLayoutInOneLine) {
  Start();
  Speaker speaker(ends_);
  Hello hello = speaker.OwnHello();
  hello.shape.layout.head_dim = 5;
  std::string line;
  EXPECT_EQ(speaker.SayHello(hello, &line).type, FrameType::kRefuse);
  EXPECT_EQ(line, "KV head_dim: decode-0 has 8, prefill-9 has 5");
  speaker.ExpectClosed();
  EXPECT_EQ(ends_.receiver->Counters().refused_connections, 1);
}

TEST_F(KvReceiverTest, WrongTokenWritesNothingAndClosesTheConnection) {
  Start();
  const KvSendTarget good = ends_.Expect(id_, 1, {4});
  KvSendTarget bad = good;
  bad.token[31] = static_cast<char>(bad.token[31] ^ 1);
  Speaker forger(ends_);
  forger.Greet();
  forger.Open(bad);
  forger.Data(id_, 1, 0, 0, 1);
  forger.ExpectClosed();
  EXPECT_EQ(ends_.receiver->Counters().auth_failures, 1);
  ExpectUntouched({4});
  EXPECT_EQ(ends_.record.Received(id_, 1).failed, 0);
  // The real sender is not harmed by the forger.
  Speaker speaker(ends_);
  speaker.Greet();
  speaker.Open(good);
  for (uint32_t layer = 0; layer < kLayers; ++layer) speaker.Data(id_, 1, 0, layer, 1);
  speaker.Finish(id_, 1, {1});
  EXPECT_EQ(ends_.record.AwaitQuiet(id_, 1).sealed, 1);
  ends_.ExpectEqualBlocks({1}, {4});
}

// One of the cluster, with the right token, and not the worker that the router named.
TEST_F(KvReceiverTest, OnlyTheNamedSenderOpensATransfer) {
  Start();
  const KvSendTarget target = ends_.Expect(id_, 1, {4}, "prefill-1");
  Speaker other(ends_);  // prefill-9
  other.Greet();
  other.Open(target);
  other.Data(id_, 1, 0, 0, 1);
  other.ExpectClosed();
  EXPECT_EQ(ends_.receiver->Counters().auth_failures, 1);
  ExpectUntouched({4});
  EXPECT_EQ(ends_.record.Received(id_, 1).failed, 0);
  Speaker named(ends_);
  named.Greet();
  named.Open(ends_.Expect(id_, 2, {5}, "prefill-9"));
  for (uint32_t layer = 0; layer < kLayers; ++layer) named.Data(id_, 2, 0, layer, 1);
  named.Finish(id_, 2, {1});
  EXPECT_EQ(ends_.record.AwaitQuiet(id_, 2).sealed, 1);
}

TEST_P(KvReceiverOver, DataBeforeAnyTokenClosesTheConnection) {
  Start();
  ends_.Expect(id_, 1, {4});
  Speaker speaker(ends_);
  speaker.Greet();
  speaker.Data(id_, 1, 0, 0, 1);
  speaker.ExpectClosed();
  EXPECT_EQ(ends_.receiver->Counters().auth_failures, 1);
  ExpectUntouched({4});
}

TEST_P(KvReceiverOver, TokenOfOneTransferOpensNoOther) {
  Start();
  const TransferId other = TransferId::Random();
  const KvSendTarget mine = ends_.Expect(id_, 1, {4});
  ends_.Expect(other, 1, {5});
  Speaker speaker(ends_);
  speaker.Greet();
  speaker.Open(mine);
  speaker.Data(other, 1, 0, 0, 1);
  const FrameHeader reply = speaker.Read();
  EXPECT_EQ(reply.type, FrameType::kAbort);
  EXPECT_EQ(reply.id, other);
  ExpectUntouched({5});
  KvSendTarget stolen = mine;
  stolen.id = other;
  speaker.Open(stolen);
  speaker.ExpectClosed();
  EXPECT_EQ(ends_.receiver->Counters().auth_failures, 1);
}

TEST_F(KvReceiverTest, NothingOpensBeforeATransportIsSelected) {
  Start();
  const KvSendTarget target = ends_.Expect(id_, 1, {4});
  Speaker speaker(ends_);
  std::string reply;
  EXPECT_EQ(speaker.SayHello(speaker.OwnHello(), &reply).type, FrameType::kHelloOk);
  speaker.Open(target);
  speaker.ExpectClosed();
  ExpectUntouched({4});
}

TEST_F(KvReceiverTest, StrangersLearnAndReachNothing) {
  options().cluster_secret = "s3cret";
  options().auth_timeout = absl::Milliseconds(200);
  Start();
  const KvSendTarget target = ends_.Expect(id_, 1, {4});
  // One that says hello without a proof, one with a wrong proof, one with an unknown secret.
  Speaker rude(ends_);
  const std::string hello = EncodeHello(rude.OwnHello());
  FrameHeader header;
  header.payload_bytes = static_cast<uint32_t>(hello.size());
  header.payload_digest = PayloadDigest(std::as_bytes(std::span(hello)));
  rude.Send(header, std::as_bytes(std::span(hello)));
  rude.ExpectClosed();
  Speaker guesser(ends_);
  EXPECT_EQ(guesser.ProveSecret("guess").type, FrameType::kRefuse);
  guesser.ExpectClosed();
  Speaker silent(ends_);
  silent.ExpectClosed();
  EXPECT_EQ(ends_.receiver->Counters().auth_failures, 3);
  EXPECT_EQ(ends_.receiver->Counters().connections_opened, 0);
  ExpectUntouched({4});
}

TEST_F(KvReceiverTest, AProofServesOnce) {
  options().cluster_secret = "s3cret";
  Start();
  Speaker worker(ends_);
  EXPECT_EQ(worker.ProveSecret("s3cret").type, FrameType::kProved);
  Speaker replayer(ends_);
  std::string challenge;
  EXPECT_EQ(replayer.Read(&challenge).type, FrameType::kChallenge);
  EXPECT_EQ(replayer.Present(worker.proof()).type, FrameType::kRefuse);
  replayer.ExpectClosed();
  // Nor does a receiver's own proof, which is for another purpose, sent back to it.
  Speaker mirror(ends_);
  EXPECT_EQ(mirror.Read(&challenge).type, FrameType::kChallenge);
  const std::string nonce = challenge.substr(0, kNonceBytes);
  const std::string reflected =
      Prove("s3cret", ProofPurpose::kKvReceiver, {"prefill-9", nonce, "decode-0", nonce});
  EXPECT_EQ(mirror.Present(reflected + nonce + "prefill-9").type, FrameType::kRefuse);
}

// However busy it is: the deadline does not wait for an empty socket.
TEST_F(KvReceiverTest, RepeatedHellosAndUnknownOpensEndTheConnection) {
  options().auth_timeout = absl::Seconds(60);
  Start();
  Speaker hellos(ends_);
  hellos.Greet();
  const std::string hello = EncodeHello(hellos.OwnHello());
  FrameHeader header;
  header.payload_bytes = static_cast<uint32_t>(hello.size());
  header.payload_digest = PayloadDigest(std::as_bytes(std::span(hello)));
  for (int i = 0; i < 100; ++i) hellos.Send(header, std::as_bytes(std::span(hello)));
  hellos.ExpectClosed();
  Speaker opens(ends_);
  opens.Greet();
  KvSendTarget unknown = ends_.Expect(id_, 1, {4});
  for (uint64_t epoch = 2; epoch < 102; ++epoch) {
    unknown.epoch = epoch;
    opens.Open(unknown);
  }
  opens.ExpectClosed();
  EXPECT_EQ(ends_.receiver->Counters().auth_failures, 2);
}

TEST_F(KvReceiverTest, ADripOfBytesDoesNotExtendTheDeadline) {
  options().auth_timeout = absl::Milliseconds(300);
  Start();
  Speaker drip(ends_);
  FrameHeader proof = Speaker::Header(FrameType::kProof, {}, 0);
  proof.payload_bytes = 200;
  drip.Send(proof, {});
  std::atomic<bool> dripping = true;
  std::thread sender([&] {
    for (int i = 0; i < 100; ++i) {
      const std::byte byte{0};
      drip.Write({&byte, 1});
      absl::SleepFor(absl::Milliseconds(20));
    }
    dripping = false;
  });
  drip.ExpectClosed();
  EXPECT_TRUE(dripping);
  sender.join();
}

// 10 strangers for each place that they have, who hold it as long as they can: a worker that
// connects meanwhile ships its blocks.
TEST_F(KvReceiverTest, StrangersKeepNobodyOut) {
  options().cluster_secret = ends_.sender_options.cluster_secret = "s3cret";
  options().max_strangers = 4;
  Start();
  ends_.StartSender();
  std::vector<std::unique_ptr<Speaker>> strangers;
  for (int i = 0; i < 40; ++i) strangers.push_back(std::make_unique<Speaker>(ends_));
  const TransferId id = ends_.ShipOne();
  EXPECT_OK(ends_.record.AwaitDone(id, 1).status);
  EXPECT_EQ(ends_.record.AwaitQuiet(id, 1).sealed, 1);
}

size_t NumEntries(const std::string& directory) {
  const std::filesystem::directory_iterator all(directory);
  return static_cast<size_t>(std::distance(begin(all), end(all)));
}

// Half of them say nothing, half what nobody understands. They have max_strangers threads at most
// between them, and on a slow machine as many again that are about to end, for some seconds, and
// some lines of the log; and a worker that comes last gets in.
TEST_F(KvReceiverTest, AThousandStrangersCostLittleAndKeepNobodyOut) {
  constexpr size_t kStrangers = 1000;
  options().cluster_secret = ends_.sender_options.cluster_secret = "s3cret";
  options().auth_timeout = absl::Seconds(2);
  ends_.sender_options.connect_timeout = kPatience;
  std::ostringstream log;
  const auto sink = std::make_shared<spdlog::sinks::ostream_sink_mt>(log);
  spdlog::default_logger()->sinks().push_back(sink);
  Start();
  ends_.StartSender();
  const size_t threads = NumEntries("/proc/self/task");
  const size_t descriptors = NumEntries("/proc/self/fd");
  const absl::Time begin = absl::Now();
  std::vector<std::unique_ptr<Speaker>> strangers;
  const std::vector<std::byte> garbage(4096, std::byte{0x16});
  while (strangers.size() < kStrangers) {
    strangers.push_back(std::make_unique<Speaker>(ends_));
    if (strangers.size() % 2 == 0) strangers.back()->Write(garbage);
    EXPECT_LE(NumEntries("/proc/self/task"), threads + 2 * 64 + 8);  // and what serves the sender
  }
  const TransferId id = ends_.ShipOne();
  EXPECT_OK(ends_.record.AwaitDone(id, 1).status);
  // Two descriptors a connection, and those of the strangers themselves.
  EXPECT_LE(NumEntries("/proc/self/fd"), descriptors + kStrangers + 2 * (2 * 64 + 4));
  const auto gone = [&] {
    return NumEntries("/proc/self/task") <= threads + 2 &&
           NumEntries("/proc/self/fd") <= descriptors + kStrangers + 2 * 4;
  };
  while (!gone() && absl::Now() - begin < kPatience) absl::SleepFor(absl::Milliseconds(50));
  EXPECT_LE(NumEntries("/proc/self/task"), threads + 2);
  EXPECT_LE(NumEntries("/proc/self/fd"), descriptors + kStrangers + 2 * 4);
  ends_.sender.reset();
  ends_.receiver.reset();
  spdlog::default_logger()->sinks().pop_back();
  const std::string lines = log.str();
  EXPECT_LE(std::count(lines.begin(), lines.end(), '\n'),
            60 + 2 * absl::ToInt64Seconds(absl::Now() - begin));
}

TEST_F(KvReceiverTest, ASilentConnectionIsClosed) {
  options().auth_timeout = absl::Milliseconds(50);
  Start();
  Speaker silent(ends_);
  silent.ExpectClosed();
}

TEST_F(KvReceiverTest, AConnectionWithoutATokenIsClosed) {
  options().auth_timeout = absl::Seconds(2);  // what a greeting may take
  Start();
  Speaker polite(ends_);
  polite.Greet();
  polite.ExpectClosed();
}

TEST_F(KvReceiverTest, GarbledOrEndlessConnectionsAreClosed) {
  options().auth_timeout = kPatience;
  Start();
  Speaker garbled(ends_);
  FrameHeader nonsense;
  nonsense.type = static_cast<FrameType>(77);
  garbled.Send(nonsense, {});
  garbled.ExpectClosed();
  Speaker endless(ends_);
  endless.Greet();
  FrameHeader probe;
  probe.type = FrameType::kProbe;
  probe.payload_bytes = kMaxProbePayload;
  const std::vector<std::byte> zeros(kMaxProbePayload);
  for (size_t sent = 0; sent <= kMaxProbedBytes; sent += zeros.size()) endless.Send(probe, zeros);
  endless.ExpectClosed();
}

TEST_F(KvReceiverTest, FramesThatDoNotFitTheTransferCloseTheConnection) {
  Start();
  uint64_t epoch = 0;
  const auto breaks = [&](auto change) {
    ++epoch;
    Speaker speaker(ends_);
    speaker.Greet();
    speaker.Open(ends_.Expect(id_, epoch, {4, 5}));
    FrameHeader header = Speaker::Header(FrameType::kData, id_, epoch);
    header.ordinal_count = 1;
    header.layer_count = 1;
    header.head_count = kHeads;
    header.payload_bytes = static_cast<uint32_t>(SmallLayout().BlockLayerBytes());
    change(&header);
    speaker.Send(header, {});
    speaker.ExpectClosed();
    const Record::Receiver got = ends_.record.AwaitQuiet(id_, epoch);
    EXPECT_EQ(got.status.code(), absl::StatusCode::kUnavailable);
    EXPECT_EQ(got.failed, 1);
  };
  breaks([](FrameHeader* h) { h->ordinal_begin = 2; });
  breaks([](FrameHeader* h) { h->ordinal_begin = kMaxOrdinals; });
  breaks([](FrameHeader* h) { h->layer_begin = kLayers; });
  breaks([](FrameHeader* h) { h->payload_bytes += 1; });
  breaks([](FrameHeader* h) { h->ordinal_count = 2; });
  breaks([](FrameHeader* h) { h->ordinal_count = 0; });
  breaks([](FrameHeader* h) { h->head_count = 1; });
  breaks([](FrameHeader* h) { h->head_begin = 1; });
  breaks([](FrameHeader* h) { h->head_begin = kMaxHeads; });
  breaks([](FrameHeader* h) { h->type = FrameType::kHelloOk; });
  breaks([](FrameHeader* h) { h->type = FrameType::kFinish; });
  ExpectUntouched({4, 5});
}

TEST_F(KvReceiverTest, OrderAndRepetitionDoNotMatter) {
  Start();
  Speaker speaker(ends_);
  speaker.Greet();
  speaker.Open(ends_.Expect(id_, 1, {9, 2}));
  speaker.Finish(id_, 1, {6, 7});
  for (int layer = kLayers - 1; layer >= 0; --layer) {
    speaker.Data(id_, 1, 1, static_cast<uint32_t>(layer), 7);
    // Repeated with other bytes: what has arrived is not written again.
    speaker.Data(id_, 1, 1, static_cast<uint32_t>(layer), 8);
  }
  speaker.Finish(id_, 1, {8, 8});
  // Two layers in one frame, one of which is there already.
  speaker.Data(id_, 1, 0, 1, 6);
  const KvRegion& region = ends_.source.region();
  FrameHeader two = Speaker::Header(FrameType::kData, id_, 1);
  two.ordinal_count = 1;
  two.layer_count = kLayers;
  two.head_count = kHeads;
  std::vector<std::byte> payload;
  for (int layer = 0; layer < static_cast<int>(kLayers); ++layer) {
    const int block = layer == 1 ? 8 : 6;
    const std::byte* bytes = region.Block(layer, block);
    payload.insert(payload.end(), bytes, bytes + region.layout.BlockLayerBytes());
  }
  two.payload_bytes = static_cast<uint32_t>(payload.size());
  speaker.Send(two, payload);
  EXPECT_EQ(ends_.record.AwaitQuiet(id_, 1).sealed, 1);
  ends_.ExpectEqualBlocks({6, 7}, {9, 2});
  const FrameHeader result = speaker.Read();
  EXPECT_EQ(result.type, FrameType::kResult);
  EXPECT_EQ(result.code, 0u);
  EXPECT_EQ(ends_.receiver->Counters().duplicate_frames, kLayers + 1);
  // Late ones after the seal are dropped as well.
  speaker.Data(id_, 1, 0, 0, 8);
  speaker.Open(ends_.Expect(id_, 2, {3}));
  speaker.Finish(id_, 2, {});  // wrong number of digests: ends the connection, so all was read
  speaker.ExpectClosed();
  EXPECT_EQ(ends_.receiver->Counters().late_frames, 1);
  ends_.ExpectEqualBlocks({6, 7}, {9, 2});
}

// Heads come from wherever they are computed: each range with a FINISH of its own.
TEST_F(KvReceiverTest, HeadsMayComeAndFinishApart) {
  Start();
  Speaker speaker(ends_);
  speaker.Greet();
  speaker.Open(ends_.Expect(id_, 1, {9}));
  for (const int head : {1, 0}) {
    for (int layer = 0; layer < static_cast<int>(kLayers); ++layer) {
      FrameHeader header = Speaker::Header(FrameType::kData, id_, 1);
      header.ordinal_count = 1;
      header.layer_begin = static_cast<uint32_t>(layer);
      header.layer_count = 1;
      header.head_begin = static_cast<uint32_t>(head);
      header.head_count = 1;
      header.payload_bytes = 2 * static_cast<uint32_t>(SmallLayout().PageBytes());
      speaker.Send(header, speaker.Page(layer, 6, PageKind::kKey, head));
      speaker.Write(speaker.Page(layer, 6, PageKind::kValue, head));
    }
    EXPECT_EQ(ends_.record.Received(id_, 1).sealed, 0);
    speaker.Finish(id_, 1, {6}, 0, {head, 1});
    speaker.Finish(id_, 1, {6}, 1, {head, 1});  // repeated, and wrong: the first one counts
  }
  EXPECT_EQ(ends_.record.AwaitQuiet(id_, 1).sealed, 1);
  ends_.ExpectEqualBlocks({6}, {9});
}

TEST_P(KvReceiverOver, WrongDigestIsNeverSealed) {
  Start();
  Speaker speaker(ends_);
  speaker.Greet();
  speaker.Open(ends_.Expect(id_, 1, {9}));
  for (uint32_t layer = 0; layer < kLayers; ++layer) speaker.Data(id_, 1, 0, layer, 6);
  speaker.Finish(id_, 1, {6}, /*spoil=*/1);
  const Record::Receiver got = ends_.record.AwaitQuiet(id_, 1);
  EXPECT_EQ(got.sealed, 0);
  EXPECT_EQ(got.failed, 1);
  EXPECT_EQ(got.status.code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(ends_.receiver->Counters().failed(KvFailure::kDigestMismatch), 1);
  EXPECT_EQ(speaker.Read().code, static_cast<uint32_t>(absl::StatusCode::kDataLoss));
}

TEST_P(KvReceiverOver, MissingPiecesFailTheTransfer) {
  options().incomplete_timeout = absl::Milliseconds(50);
  Start();
  Speaker speaker(ends_);
  speaker.Greet();
  speaker.Open(ends_.Expect(id_, 1, {9}));
  speaker.Data(id_, 1, 0, 0, 6);
  speaker.Finish(id_, 1, {6});
  const Record::Receiver got = ends_.record.AwaitQuiet(id_, 1);
  EXPECT_EQ(got.status.code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(ends_.receiver->Counters().failed(KvFailure::kIncomplete), 1);
  EXPECT_EQ(speaker.Read().type, FrameType::kResult);
}

// Who hears of quiet first takes the blocks for free, and then hears that they failed. Here the
// receiver gives up, on one thread, and before it has said so the sender does, on another.
TEST_P(KvReceiverOver, NoTransferIsQuietBeforeItHasFailed) {
  absl::Notification failing, handled;
  options().incomplete_timeout = absl::Milliseconds(1);
  options().on_failed = [&, record = options().on_failed](const TransferId& id, uint64_t epoch,
                                                          const absl::Status& status) {
    failing.Notify();
    EXPECT_TRUE(handled.WaitForNotificationWithTimeout(kPatience));
    record(id, epoch, status);
  };
  Start();
  Speaker speaker(ends_);
  speaker.Greet();
  speaker.Open(ends_.Expect(id_, 1, {9}));
  speaker.Finish(id_, 1, {6});
  ASSERT_TRUE(failing.WaitForNotificationWithTimeout(kPatience));
  speaker.Quiet(id_, 1);
  speaker.AwaitHandled();
  EXPECT_EQ(ends_.record.Received(id_, 1).quiet, 0);
  handled.Notify();
  const Record::Receiver got = ends_.record.AwaitQuiet(id_, 1);
  EXPECT_EQ(got.failed, 1);
  EXPECT_EQ(got.quiet, 1);
  ends_.receiver.reset();  // before what its callback uses
}

TEST_F(KvReceiverTest, LostSenderFailsItsTransfersAtOnce) {
  Start();
  const TransferId other = TransferId::Random();
  Speaker speaker(ends_);
  speaker.Greet();
  speaker.Open(ends_.Expect(id_, 1, {9}));
  speaker.Data(id_, 1, 0, 0, 6, /*cut=*/10);
  speaker.Close();
  const Record::Receiver got = ends_.record.AwaitQuiet(id_, 1);
  EXPECT_EQ(got.failed, 1);
  EXPECT_EQ(got.status.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(ends_.receiver->Counters().failed(KvFailure::kConnectionLost), 1);
  // Whoever has not begun is not harmed.
  ends_.Expect(other, 1, {9});
  EXPECT_EQ(ends_.record.Received(other, 1).failed, 0);
}

TEST_P(KvReceiverOver, SenderThatGivesUp) {
  Start();
  Speaker speaker(ends_);
  speaker.Greet();
  speaker.Open(ends_.Expect(id_, 1, {9}));
  speaker.Quiet(id_, 1);
  speaker.Quiet(id_, 1);
  const Record::Receiver got = ends_.record.AwaitQuiet(id_, 1);
  EXPECT_EQ(got.status.code(), absl::StatusCode::kAborted);
  EXPECT_EQ(ends_.receiver->Counters().failed(KvFailure::kPeerAborted), 1);
}

TEST_F(KvReceiverTest, CancelBeforeTheSenderComes) {
  Start();
  const KvSendTarget target = ends_.Expect(id_, 1, {9});
  ends_.receiver->Cancel(id_, 1);
  ends_.receiver->Cancel(id_, 1);
  Speaker speaker(ends_);
  speaker.Greet();
  speaker.Open(target);
  const FrameHeader reply = speaker.Read();
  EXPECT_EQ(reply.type, FrameType::kAbort);
  EXPECT_EQ(reply.code, static_cast<uint32_t>(absl::StatusCode::kCancelled));
  speaker.Data(id_, 1, 0, 0, 6);
  EXPECT_EQ(speaker.Read().type, FrameType::kAbort);
  speaker.Quiet(id_, 1);
  const Record::Receiver got = ends_.record.AwaitQuiet(id_, 1);
  EXPECT_EQ(got.sealed + got.failed, 0);
  ExpectUntouched({9});
  EXPECT_EQ(ends_.receiver->Counters().late_frames, 1);
}

TEST_F(KvReceiverTest, CancelledBeforeASenderCameIsQuietAtOnce) {
  options().quiet_timeout = absl::Hours(1);  // nothing waits for it
  Start();
  const KvSendTarget target = ends_.Expect(id_, 1, {9});
  ends_.receiver->Cancel(id_, 1);
  EXPECT_EQ(ends_.record.AwaitQuiet(id_, 1).quiet, 1);
  // Too late now, but harmless.
  ASSERT_OK(ends_.receiver->Expect(id_, 2, {9}, ""));
  Speaker speaker(ends_);
  speaker.Greet();
  speaker.Open(target);
  EXPECT_EQ(speaker.Read().type, FrameType::kAbort);
  speaker.Data(id_, 1, 0, 0, 6);
  EXPECT_EQ(speaker.Read().type, FrameType::kAbort);
  ExpectUntouched({9});
  EXPECT_EQ(ends_.record.Received(id_, 1).quiet, 1);
}

TEST_F(KvReceiverTest, CancelledSenderThatDoesNotAnswerLosesItsConnection) {
  options().quiet_timeout = absl::Milliseconds(30);
  Start();
  Speaker speaker(ends_);
  speaker.Greet();
  speaker.Open(ends_.Expect(id_, 1, {9}));
  speaker.AwaitHandled();
  speaker.Data(id_, 1, 0, 0, 6, /*cut=*/100);
  ends_.receiver->Cancel(id_, 1);
  EXPECT_EQ(ends_.record.AwaitQuiet(id_, 1).quiet, 1);
  speaker.ExpectClosed();
}

// A cancel at the moment at which the last frame seals: one of the two it is, and the sender hears
// which, or it would hold its blocks until it gives up.
TEST_F(KvReceiverTest, ACancelBesideTheSealLeavesTheSenderAnAnswer) {
  Start();
  Speaker speaker(ends_);
  speaker.Greet();
  for (uint64_t epoch = 1; epoch <= 400; ++epoch) {
    speaker.Open(ends_.Expect(id_, epoch, {9}));
    for (uint32_t layer = 0; layer < kLayers; ++layer) speaker.Data(id_, epoch, 0, layer, 1);
    std::thread canceller([&] {
      const absl::Time when = absl::Now() + absl::Microseconds(2 * (epoch % 100));
      while (absl::Now() < when) {
      }
      ends_.receiver->Cancel(id_, epoch);
    });
    speaker.Finish(id_, epoch, {1});
    FrameHeader answer = speaker.Read();
    while (answer.epoch != epoch) answer = speaker.Read();  // of earlier ones, a second one
    canceller.join();
    const bool result = answer.type == FrameType::kResult;
    ASSERT_TRUE(result || answer.type == FrameType::kAbort) << FrameTypeName(answer.type);
    speaker.Quiet(id_, epoch);
    const Record::Receiver got = ends_.record.AwaitQuiet(id_, epoch);
    EXPECT_EQ(got.quiet, 1);
    EXPECT_LE(got.sealed + got.failed, 1);
  }
}

// Cancel in the middle of a frame, at many places of it; then the blocks belong to another epoch,
// and late frames of the old one write nothing.
TEST_F(KvReceiverTest, CancelInsideAFrameThenReuse) {
  Start();
  const size_t bytes = SmallLayout().BlockLayerBytes();
  uint64_t epoch = 0;
  for (size_t cut = 0; cut <= bytes; cut += bytes / 8) {
    const uint64_t old = ++epoch;
    Speaker speaker(ends_);
    speaker.Greet();
    speaker.Open(ends_.Expect(id_, old, {9, 3}));
    speaker.Data(id_, old, 0, 0, 6);
    speaker.AwaitHandled();
    speaker.Data(id_, old, 1, 0, 7, cut);
    ends_.receiver->Cancel(id_, old);
    const std::string first = ends_.target.BlockBytes(9);
    const std::string second = ends_.target.BlockBytes(3);
    // The rest of the frame, and another one.
    const auto status = ends_.receiver->Expect(id_, old + 100, {9}, "");
    EXPECT_EQ(status.status().code(), absl::StatusCode::kFailedPrecondition);
    speaker.Write(speaker.Piece(0, 7).subspan(cut));
    speaker.Data(id_, old, 0, 1, 6);
    speaker.Quiet(id_, old);
    EXPECT_EQ(ends_.record.AwaitQuiet(id_, old).quiet, 1);
    EXPECT_EQ(ends_.target.BlockBytes(9), first);
    EXPECT_EQ(ends_.target.BlockBytes(3), second);

    const uint64_t fresh = ++epoch;
    Speaker next(ends_);
    next.Greet();
    next.Open(ends_.Expect(id_, fresh, {3, 9}));
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      speaker.Data(id_, old, 0, layer, 1);  // the old epoch's stray frames
      speaker.Data(id_, old, 1, layer, 1);
      next.Data(id_, fresh, 0, layer, 6);
      next.Data(id_, fresh, 1, layer, 7);
    }
    speaker.Data(id_, fresh, 0, 0, 1);  // the new epoch, on a connection that did not open it
    next.Finish(id_, fresh, {6, 7});
    EXPECT_EQ(ends_.record.AwaitQuiet(id_, fresh).sealed, 1);
    speaker.Open(ends_.Expect(id_, 1000 + old, {}));
    speaker.Finish(id_, 1000 + old, {});
    EXPECT_EQ(ends_.record.AwaitQuiet(id_, 1000 + old).sealed, 1);  // so all of it was read
    ends_.ExpectEqualBlocks({6, 7}, {3, 9});
  }
}

TEST_P(KvReceiverOver, SecondConnectionCannotTakeOver) {
  Start();
  const KvSendTarget target = ends_.Expect(id_, 1, {9});
  Speaker first(ends_);
  first.Greet();
  first.Open(target);
  first.Data(id_, 1, 0, 0, 6);
  first.AwaitHandled();  // so the first one has opened it
  Speaker second(ends_);
  second.Greet();
  second.Open(target);
  EXPECT_EQ(second.Read().code, static_cast<uint32_t>(absl::StatusCode::kAlreadyExists));
  second.Data(id_, 1, 0, 1, 8);
  EXPECT_EQ(second.Read().type, FrameType::kAbort);
  second.Quiet(id_, 1);
  second.Close();
  for (uint32_t layer = 1; layer < kLayers; ++layer) first.Data(id_, 1, 0, layer, 6);
  first.Finish(id_, 1, {6});
  EXPECT_EQ(ends_.record.AwaitQuiet(id_, 1).sealed, 1);
  ends_.ExpectEqualBlocks({6}, {9});
}

// The fence, seen from the receiver: the socket of a writer may end before its writes do.
TEST(KvReceiverFence, ALostConnectionIsNotQuietUntilItsWriterHasDetached) {
  Ends ends("shm");
  ends.StartReceiver();
  const TransferId id = TransferId::Random();
  Speaker speaker(ends);
  speaker.Greet();
  speaker.Open(ends.Expect(id, 1, {9}));
  speaker.AwaitHandled();
  speaker.Close();
  while (ends.receiver->Counters().fenced_transfers == 0) absl::SleepFor(absl::Milliseconds(1));
  EXPECT_EQ(ends.record.Received(id, 1).failed, 1);
  EXPECT_EQ(ends.record.Received(id, 1).quiet, 0);
  EXPECT_EQ(ends.receiver->Expect(id, 2, {9}, "").status().code(),
            absl::StatusCode::kFailedPrecondition);
  speaker.Detach();
  ends.record.AwaitQuiet(id, 1);
  EXPECT_OK(ends.receiver->Expect(id, 2, {9}, ""));
}

TEST_P(KvReceiverOver, ExpectRefusesWhatItCannotKeepApart) {
  Start();
  ASSERT_OK(ends_.receiver->Expect(id_, 1, {1, 2}, ""));
  EXPECT_EQ(ends_.receiver->Expect(id_, 1, {3}, "").status().code(),
            absl::StatusCode::kAlreadyExists);
  EXPECT_EQ(ends_.receiver->Expect(id_, 2, {3, 2}, "").status().code(),
            absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(ends_.receiver->Expect(id_, 2, {40}, "").status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ends_.receiver->Expect(id_, 2, {-1}, "").status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(ends_.receiver->Expect(id_, 2, {5, 5}, "").status().ToString(),
              HasSubstr("named twice"));
  // None of the refused ones keeps a block.
  EXPECT_OK(ends_.receiver->Expect(id_, 2, {3, 5}, ""));
}

TEST_F(KvReceiverTest, ConnectionsAreBounded) {
  options().max_connections = 2;
  Start();
  Speaker a(ends_);
  a.Greet();
  Speaker b(ends_);
  b.Greet();
  Speaker c(ends_);
  c.ExpectClosed();
  EXPECT_EQ(ends_.receiver->Counters().refused_connections, 1);
}

// Whoever should clear it away is in a callback.
TEST_F(KvReceiverTest, AConnectionThatHasEndedTakesNoPlace) {
  absl::Notification failing, handled;
  options().max_connections = 1;
  options().incomplete_timeout = absl::Milliseconds(1);
  options().on_failed = [&](const TransferId&, uint64_t, const absl::Status&) {
    failing.Notify();
    EXPECT_TRUE(handled.WaitForNotificationWithTimeout(2 * kPatience));
  };
  Start();
  Speaker speaker(ends_);
  speaker.Greet();
  speaker.Open(ends_.Expect(id_, 1, {9}));
  speaker.Finish(id_, 1, {6});
  ASSERT_TRUE(failing.WaitForNotificationWithTimeout(kPatience));
  speaker.Close();
  absl::Status heard = absl::UnknownError("nobody was asked");
  for (const absl::Time begin = absl::Now(); !heard.ok() && absl::Now() - begin < kPatience;) {
    auto next = TcpNetwork()->Dial(ends_.receiver->address(), kPatience);
    heard = next.ok() ? (*next)->ReceiveHeader(kPatience).status() : next.status();
    if (!heard.ok()) absl::SleepFor(absl::Milliseconds(10));
  }
  EXPECT_OK(heard);
  handled.Notify();
  ends_.receiver.reset();  // before what its callback uses
}

TEST_P(KvReceiverOver, ClosingEndsEverything) {
  Start();
  Speaker speaker(ends_);
  speaker.Greet();
  speaker.Open(ends_.Expect(id_, 1, {9}));
  speaker.Data(id_, 1, 0, 0, 6, /*cut=*/5);
  ends_.Expect(id_, 2, {8});
  ends_.Expect(id_, 3, {7});
  ends_.receiver->Cancel(id_, 3);
  ends_.receiver.reset();
  for (const uint64_t epoch : {1, 2, 3}) {
    EXPECT_EQ(ends_.record.Received(id_, epoch).quiet, 1) << epoch;
    EXPECT_EQ(ends_.record.Received(id_, epoch).failed, epoch == 3 ? 0 : 1) << epoch;
  }
  speaker.ExpectClosed();
}

TEST_F(KvReceiverTest, BadOptions) {
  options().port = 70000;
  EXPECT_THAT(KvReceiver::Start(options()).status().ToString(), HasSubstr("port must be"));
  options().port = 0;
  options().listen_host = "no such host";
  EXPECT_EQ(KvReceiver::Start(options()).status().code(), absl::StatusCode::kInvalidArgument);
  options().listen_host = "127.0.0.1";
  options().advertise_host = "decode.example";
  Start();
  EXPECT_THAT(ends_.receiver->address(), ::testing::StartsWith("decode.example:"));
  options().port = std::stoi(ends_.receiver->address().substr(strlen("decode.example:")));
  EXPECT_EQ(KvReceiver::Start(options()).status().code(), absl::StatusCode::kUnavailable);
}

}  // namespace
}  // namespace tandem::kvtransfer
