// The receiver against a sender that the test speaks for, frame by frame: what no well-behaved
// sender would ever show.
#include <cerrno>
#include <cstring>
#include <netinet/in.h>
#include <optional>
#include <sys/socket.h>
#include <unistd.h>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "common/base/host_port.h"
#include "kvtransfer/channel/hello.h"
#include "kvtransfer/transport/kv_transport.h"
#include "tests/support/paths.h"
#include "tests/unit/kvtransfer/endpoint_fixture.h"

namespace tandem::kvtransfer {
namespace {

using ::testing::HasSubstr;

// A sender by hand, over a plain blocking socket.
class Speaker {
 public:
  explicit Speaker(const Ends& ends) : ends_(ends) {
    const auto address = ParseHostPort(ends.receiver->address());
    EXPECT_OK(address);
    fd_ = socket(AF_INET, SOCK_STREAM, 0);
    // A test that waits for what never comes fails instead of hanging.
    const timeval patience = {absl::ToInt64Seconds(kPatience), 0};
    setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
    setsockopt(fd_, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
    sockaddr_in to = {};
    to.sin_family = AF_INET;
    to.sin_port = htons(static_cast<uint16_t>(address->port));
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    EXPECT_EQ(connect(fd_, reinterpret_cast<sockaddr*>(&to), sizeof(to)), 0);
  }
  ~Speaker() { close(fd_); }

  Hello OwnHello() const {
    return {"prefill-9", "cap", ends_.source.region().layout, ends_.source.region().num_blocks};
  }
  FrameHeader SayHello(const Hello& hello, std::string* reply) {
    Control(FrameHeader{}, EncodeHello(hello));  // a default header is a HELLO
    return Read(reply);
  }
  void Greet() {
    std::string reply;
    EXPECT_EQ(SayHello(OwnHello(), &reply).type, FrameType::kHelloOk);
  }
  void Open(const KvSendTarget& target) {
    FrameHeader header = Header(FrameType::kOpen, target.id, target.epoch);
    header.ordinal_count = static_cast<uint32_t>(target.target_blocks.size());
    Control(header, target.token);
  }
  // One piece with the bytes of `source_block`; only the first `cut` bytes of it, if it has more.
  void Data(const TransferId& id, uint64_t epoch, uint32_t ordinal, uint32_t layer,
            int source_block, size_t cut = SIZE_MAX) {
    const std::span<const std::byte> piece = Piece(layer, source_block);
    FrameHeader header = Header(FrameType::kData, id, epoch);
    header.ordinal_begin = ordinal;
    header.ordinal_count = 1;
    header.layer_begin = layer;
    header.layer_count = 1;
    header.payload_bytes = static_cast<uint32_t>(piece.size());
    Send(header, piece.first(std::min(piece.size(), cut)));
  }
  void Send(const FrameHeader& header, std::span<const std::byte> payload) {
    Write(EncodeHeader(header));
    Write(payload);
  }
  std::span<const std::byte> Piece(uint32_t layer, int source_block) const {
    const KvRegion& region = ends_.source.region();
    return {region.Block(static_cast<int>(layer), source_block), region.layout.BlockLayerBytes()};
  }
  void Write(std::span<const std::byte> bytes) {
    while (!bytes.empty()) {
      const ssize_t n = send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
      // The receiver may have closed already: what a test expects, it looks for in the replies.
      if (n <= 0) return;
      bytes = bytes.subspan(static_cast<size_t>(n));
    }
  }
  // FINISH with the digests of the source blocks, the first of them spoilt by `spoil`.
  void Finish(const TransferId& id, uint64_t epoch, const std::vector<int32_t>& source_blocks,
              uint64_t spoil = 0) {
    std::vector<uint64_t> digests;
    for (const int32_t block : source_blocks) {
      uint64_t digest = 0;
      for (int layer = 0; layer < SmallLayout().num_layers; ++layer) {
        const auto index = static_cast<uint32_t>(layer);
        digest ^= BlockLayerDigest(Piece(index, block), index);
      }
      digests.push_back(digest);
    }
    if (!digests.empty()) digests[0] ^= spoil;
    Control(Header(FrameType::kFinish, id, epoch),
            {reinterpret_cast<const char*>(digests.data()), 8 * digests.size()});
  }
  void Quiet(const TransferId& id, uint64_t epoch) {
    Control(Header(FrameType::kQuiet, id, epoch), "test");
  }
  FrameHeader Read(std::string* payload) {
    const auto header = TryRead(payload);
    EXPECT_TRUE(header.has_value()) << "connection closed";
    return header.value_or(FrameHeader{});
  }
  FrameHeader Read() {
    std::string ignored;
    return Read(&ignored);
  }
  // Skips replies up to the end of the connection.
  void ExpectClosed() {
    std::string ignored;
    while (TryRead(&ignored).has_value()) {
    }
    EXPECT_TRUE(closed_) << "still open";
  }
  void Close() { shutdown(fd_, SHUT_RDWR); }
  static FrameHeader Header(FrameType type, const TransferId& id, uint64_t epoch) {
    FrameHeader header;
    header.type = type;
    header.id = id;
    header.epoch = epoch;
    return header;
  }

 private:
  void Control(FrameHeader header, std::string_view payload) {
    const auto bytes = std::as_bytes(std::span(payload));
    header.payload_bytes = static_cast<uint32_t>(payload.size());
    header.payload_digest = PayloadDigest(bytes);
    Send(header, bytes);
  }
  bool ReadExactly(std::span<std::byte> into) {
    while (!into.empty()) {
      const ssize_t n = recv(fd_, into.data(), into.size(), 0);
      if (n <= 0) {
        closed_ = n == 0 || errno == ECONNRESET;
        return false;
      }
      into = into.subspan(static_cast<size_t>(n));
    }
    return true;
  }
  std::optional<FrameHeader> TryRead(std::string* payload) {
    EncodedHeader encoded;
    if (!ReadExactly(encoded)) return std::nullopt;
    const auto header = DecodeHeader(encoded);
    EXPECT_OK(header);
    if (!header.ok()) return std::nullopt;
    payload->resize(header->payload_bytes);
    if (!ReadExactly(std::as_writable_bytes(std::span(*payload)))) return std::nullopt;
    EXPECT_EQ(PayloadDigest(std::as_bytes(std::span(*payload))), header->payload_digest);
    return *header;
  }

  const Ends& ends_;
  int fd_ = -1;
  bool closed_ = false;
};

class KvReceiverTest : public ::testing::Test {
 protected:
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

TEST_F(KvReceiverTest, RefusesAnotherLayoutInOneLine) {
  Start();
  Speaker speaker(ends_);
  Hello hello = speaker.OwnHello();
  hello.layout.num_kv_heads = 5;
  std::string line;
  EXPECT_EQ(speaker.SayHello(hello, &line).type, FrameType::kRefuse);
  EXPECT_EQ(line, "KV kv_heads: decode-0 has 2, prefill-9 has 5");
  speaker.ExpectClosed();
  EXPECT_EQ(ends_.receiver->Counters().refused_channels, 1);
}

TEST_F(KvReceiverTest, WrongTokenWritesNothingAndClosesTheChannel) {
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

TEST_F(KvReceiverTest, DataBeforeAnyTokenClosesTheChannel) {
  Start();
  ends_.Expect(id_, 1, {4});
  Speaker speaker(ends_);
  speaker.Greet();
  speaker.Data(id_, 1, 0, 0, 1);
  speaker.ExpectClosed();
  EXPECT_EQ(ends_.receiver->Counters().auth_failures, 1);
  ExpectUntouched({4});
}

TEST_F(KvReceiverTest, TokenOfOneTransferOpensNoOther) {
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

TEST_F(KvReceiverTest, SilentOrGarbledConnectionsAreClosed) {
  options().auth_timeout = absl::Milliseconds(50);
  Start();
  Speaker silent(ends_);
  silent.ExpectClosed();
  Speaker polite(ends_);
  polite.Greet();
  polite.ExpectClosed();  // no token came
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
  for (int i = 0; i < 20; ++i) endless.Send(probe, zeros);
  endless.ExpectClosed();
}

TEST_F(KvReceiverTest, FramesThatDoNotFitTheTransferCloseTheChannel) {
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
  speaker.Finish(id_, 2, {});  // wrong number of digests: ends the channel, so all was read
  speaker.ExpectClosed();
  EXPECT_EQ(ends_.receiver->Counters().late_frames, 1);
  ends_.ExpectEqualBlocks({6, 7}, {9, 2});
}

TEST_F(KvReceiverTest, WrongDigestIsNeverSealed) {
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

TEST_F(KvReceiverTest, MissingPiecesFailTheTransfer) {
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
  EXPECT_EQ(ends_.receiver->Counters().failed(KvFailure::kChannelLost), 1);
  // Whoever has not begun is not harmed.
  ends_.Expect(other, 1, {9});
  EXPECT_EQ(ends_.record.Received(other, 1).failed, 0);
}

TEST_F(KvReceiverTest, SenderThatGivesUp) {
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
  EXPECT_EQ(ends_.record.Received(id_, 1).quiet, 0);
  speaker.Quiet(id_, 1);
  const Record::Receiver got = ends_.record.AwaitQuiet(id_, 1);
  EXPECT_EQ(got.sealed + got.failed, 0);
  ExpectUntouched({9});
  EXPECT_EQ(ends_.receiver->Counters().late_frames, 1);
}

TEST_F(KvReceiverTest, CancelledWithoutASenderIsQuietAfterAWhile) {
  options().no_sender_timeout = absl::Milliseconds(30);
  Start();
  const KvSendTarget target = ends_.Expect(id_, 1, {9});
  ends_.receiver->Cancel(id_, 1);
  EXPECT_EQ(ends_.record.AwaitQuiet(id_, 1).quiet, 1);
  // Too late now, but harmless.
  ASSERT_OK(ends_.receiver->Expect(id_, 2, {9}));
  Speaker speaker(ends_);
  speaker.Greet();
  speaker.Open(target);
  EXPECT_EQ(speaker.Read().type, FrameType::kAbort);
  speaker.Data(id_, 1, 0, 0, 6);
  EXPECT_EQ(speaker.Read().type, FrameType::kAbort);
  ExpectUntouched({9});
  EXPECT_EQ(ends_.record.Received(id_, 1).quiet, 1);
}

TEST_F(KvReceiverTest, CancelledSenderThatDoesNotAnswerLosesItsChannel) {
  options().quiet_timeout = absl::Milliseconds(30);
  Start();
  Speaker speaker(ends_);
  speaker.Greet();
  speaker.Open(ends_.Expect(id_, 1, {9}));
  speaker.Data(id_, 1, 0, 0, 6, /*cut=*/100);
  ends_.receiver->Cancel(id_, 1);
  EXPECT_EQ(ends_.record.AwaitQuiet(id_, 1).quiet, 1);
  speaker.ExpectClosed();
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
    speaker.Data(id_, old, 1, 0, 7, cut);
    ends_.receiver->Cancel(id_, old);
    const std::string first = ends_.target.BlockBytes(9);
    const std::string second = ends_.target.BlockBytes(3);
    // The rest of the frame, and another one.
    const auto status = ends_.receiver->Expect(id_, old + 100, {9});
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
    speaker.Data(id_, fresh, 0, 0, 1);  // the new epoch, on a channel that did not open it
    next.Finish(id_, fresh, {6, 7});
    EXPECT_EQ(ends_.record.AwaitQuiet(id_, fresh).sealed, 1);
    speaker.Open(ends_.Expect(id_, 1000 + old, {}));
    speaker.Finish(id_, 1000 + old, {});
    EXPECT_EQ(ends_.record.AwaitQuiet(id_, 1000 + old).sealed, 1);  // so all of it was read
    ends_.ExpectEqualBlocks({6, 7}, {3, 9});
  }
}

TEST_F(KvReceiverTest, SecondChannelCannotTakeOver) {
  Start();
  const KvSendTarget target = ends_.Expect(id_, 1, {9});
  Speaker first(ends_);
  first.Greet();
  first.Open(target);
  first.Data(id_, 1, 0, 0, 6);
  first.Data(TransferId::Random(), 1, 0, 0, 6);
  EXPECT_EQ(first.Read().type, FrameType::kAbort);  // so the first one has opened it
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

TEST_F(KvReceiverTest, ExpectRefusesWhatItCannotKeepApart) {
  Start();
  ASSERT_OK(ends_.receiver->Expect(id_, 1, {1, 2}));
  EXPECT_EQ(ends_.receiver->Expect(id_, 1, {3}).status().code(), absl::StatusCode::kAlreadyExists);
  EXPECT_EQ(ends_.receiver->Expect(id_, 2, {3, 2}).status().code(),
            absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(ends_.receiver->Expect(id_, 2, {40}).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ends_.receiver->Expect(id_, 2, {-1}).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(ends_.receiver->Expect(id_, 2, {5, 5}).status().ToString(), HasSubstr("named twice"));
  // None of the refused ones keeps a block.
  EXPECT_OK(ends_.receiver->Expect(id_, 2, {3, 5}));
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
  EXPECT_EQ(ends_.receiver->Counters().refused_channels, 1);
}

TEST_F(KvReceiverTest, ClosingEndsEverything) {
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
