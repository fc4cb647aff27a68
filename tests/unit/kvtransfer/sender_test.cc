// The sender against peers that refuse, stall, vanish or are not there at all.
#include <atomic>
#include <thread>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "common/auth/proof.h"
#include "kvtransfer/channel/control_frames.h"
#include "kvtransfer/channel/hello.h"
#include "kvtransfer/channel/link_proof.h"
#include "kvtransfer/transport/kv_connection.h"
#include "tests/support/paths.h"
#include "tests/unit/kvtransfer/endpoint_fixture.h"

namespace tandem::kvtransfer {
namespace {

using ::testing::HasSubstr;

// A receiver by hand.
class Listener {
 public:
  Listener() {
    auto listening = TcpNetwork()->Listen("127.0.0.1", 0);
    EXPECT_OK(listening);
    listener_ = *std::move(listening);
  }
  const std::string& address() const { return listener_->address(); }
  void Accept() {
    auto accepted = listener_->Accept(kPatience);
    ASSERT_OK(accepted);
    connection_ = *std::move(accepted);
  }
  // As a receiver that knows the secret.
  void AcceptProof() {
    Accept();
    EXPECT_OK(TakeProof());
  }
  absl::Status TakeProof() {
    return ProveToSender(connection_.get(), {"", "decode-0"}, kPatience).status();
  }
  // Accepts, answers HELLO and the link probe.
  void Greet(const Ends& ends) {
    AcceptProof();
    Answer(ends);
  }
  void Answer(const Ends& ends) {
    EXPECT_EQ(Read().type, FrameType::kHello);
    const Hello hello = {"decode-0", "cap", ShapeOf(ends.target.region()), {{"tcp", ""}}};
    Reply(Header(FrameType::kHelloOk, {}, 0), EncodeHello(hello));
    EXPECT_EQ(Read().type, FrameType::kSelect);
    Say(FrameType::kSelected, {}, 0, absl::OkStatus());
    AnswerProbes();
  }
  // Of the pattern, and of no rates.
  void AnswerProbes() {
    for (int i = 0; i < 4; ++i) {
      const auto header = connection_->ReceiveHeader(kPatience);
      ASSERT_OK(header);
      ASSERT_EQ(header->type, FrameType::kProbe);
      std::vector<std::byte> payload(header->payload_bytes);
      ASSERT_OK(ReceiveAll(connection_.get(), payload, kPatience));
      const uint64_t digest = PayloadDigest(payload);
      FrameHeader reply = Header(FrameType::kProbeAck, {}, 0);
      reply.ordinal_begin = header->ordinal_begin;
      Reply(reply, {reinterpret_cast<const char*>(&digest), sizeof(digest)});
    }
  }
  void Reply(const FrameHeader& header, std::string_view payload) {
    EXPECT_OK(SendControl(connection_.get(), header, payload, kPatience));
  }
  void Say(FrameType type, const TransferId& id, uint64_t epoch, const absl::Status& status) {
    EXPECT_OK(SendStatus(connection_.get(), type, {id, epoch}, status, kPatience));
  }
  FrameHeader Read() {
    const auto header = connection_->ReceiveHeader(kPatience);
    EXPECT_OK(header);
    if (!header.ok()) return Header(FrameType::kProbeAck, {}, 0);
    std::vector<std::byte> payload(header->payload_bytes);
    EXPECT_OK(ReceiveAll(connection_.get(), payload, kPatience));
    return *header;
  }
  // The next frame of `type`.
  FrameHeader ReadUntil(FrameType type) {
    FrameHeader header = Read();
    while (header.type != type && !HasFailure()) header = Read();
    return header;
  }
  void Close() { connection_->Shutdown(); }

 private:
  static bool HasFailure() { return ::testing::Test::HasFailure(); }
  static FrameHeader Header(FrameType type, const TransferId& id, uint64_t epoch) {
    FrameHeader header;
    header.type = type;
    header.id = id;
    header.epoch = epoch;
    return header;
  }

  std::unique_ptr<KvListener> listener_;
  std::unique_ptr<KvConnection> connection_;
};

class KvSenderTest : public ::testing::Test {
 protected:
  void Start() { ends_.StartSender(); }
  KvSendTarget Target(const std::string& address, uint64_t epoch,
                      std::vector<int32_t> blocks = {1, 2}) const {
    return {
        id_, epoch, "tcp", address, std::string(kKvTokenBytes, 't'), "decode-0", std::move(blocks)};
  }
  Record::Sender Done(uint64_t epoch) { return ends_.record.AwaitDone(id_, epoch); }
  KvSenderOptions& options() { return ends_.sender_options; }

  Ends ends_;
  const TransferId id_ = TransferId::Random();
};

TEST_F(KvSenderTest, NobodyListens) {
  std::string address;
  { address = Listener().address(); }
  Start();
  ASSERT_OK(ends_.sender->Open(Target(address, 1)));
  ends_.PushAll(id_, 1, {1, 2});
  EXPECT_EQ(Done(1).status.code(), absl::StatusCode::kUnavailable);
  ends_.sender->Finish(id_, 1);  // over already: ignored
  ends_.sender->Abort(id_, 1);
  EXPECT_EQ(ends_.sender->Counters().failed(KvFailure::kConnectionLost), 1);
  // Tried anew for the next one.
  ASSERT_OK(ends_.sender->Open(Target(address, 2)));
  EXPECT_EQ(Done(2).status.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(Done(1).done, 1);
}

TEST_F(KvSenderTest, RefusalCarriesTheReason) {
  Start();
  Listener peer;
  ASSERT_OK(ends_.sender->Open(Target(peer.address(), 1)));
  peer.AcceptProof();
  EXPECT_EQ(peer.Read().type, FrameType::kHello);
  peer.Say(FrameType::kRefuse, {}, 0, absl::FailedPreconditionError("KV dtype: a has x, b has y"));
  const Record::Sender sent = Done(1);
  EXPECT_EQ(sent.status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(sent.status.ToString(), HasSubstr("KV dtype: a has x, b has y"));
}

TEST_F(KvSenderTest, PeerThatSaysNothing) {
  options().connect_timeout = absl::Milliseconds(50);
  Start();
  Listener peer;
  ASSERT_OK(ends_.sender->Open(Target(peer.address(), 1)));
  EXPECT_FALSE(Done(1).status.ok());
}

TEST_F(KvSenderTest, PeerThatTakesNothingHoldsUpNobodyElse) {
  const KvLayout large = {2, 8, 128, 16, DType::kFloat32};  // 131,072 bytes per block and layer
  Ends ends("tcp", large, 256, 256);
  ends.sender_options.io_timeout = kPatience;
  ends.Start();
  std::vector<int32_t> blocks(256);
  for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = static_cast<int32_t>(i);
  Listener stuck;
  ASSERT_OK(ends.sender->Open(Target(stuck.address(), 1, blocks)));
  stuck.Greet(ends);
  ends.PushAll(id_, 1, blocks);  // 64 MiB: more than sockets hold
  ends.sender->Finish(id_, 1);
  const TransferId other = TransferId::Random();
  ASSERT_OK(ends.sender->Open(ends.Expect(other, 1, {3})));
  ends.PushAll(other, 1, {4});
  ends.sender->Finish(other, 1);
  EXPECT_OK(ends.record.AwaitDone(other, 1).status);
  EXPECT_EQ(ends.record.Sent(id_, 1).done, 0);
  stuck.Close();
  EXPECT_EQ(ends.record.AwaitDone(id_, 1).status.code(), absl::StatusCode::kUnavailable);
}

TEST_F(KvSenderTest, PeerThatTakesNothingForTooLongIsDead) {
  const KvLayout large = {2, 8, 128, 16, DType::kFloat32};
  Ends ends("tcp", large, 256, 256);
  ends.sender_options.io_timeout = absl::Milliseconds(100);
  ends.StartSender();
  std::vector<int32_t> blocks(256);
  for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = static_cast<int32_t>(i);
  Listener stuck;
  ASSERT_OK(ends.sender->Open(Target(stuck.address(), 1, blocks)));
  stuck.Greet(ends);
  ends.PushAll(id_, 1, blocks);
  const Record::Sender sent = ends.record.AwaitDone(id_, 1);
  EXPECT_THAT(sent.status.ToString(), HasSubstr("took nothing for 100ms"));
}

TEST_F(KvSenderTest, NoAnswerToFinish) {
  options().io_timeout = absl::Milliseconds(100);
  Start();
  Listener peer;
  ASSERT_OK(ends_.sender->Open(Target(peer.address(), 1)));
  ends_.PushAll(id_, 1, {1, 2});
  ends_.sender->Finish(id_, 1);
  peer.Greet(ends_);
  EXPECT_EQ(peer.ReadUntil(FrameType::kFinish).payload_bytes, 16u);
  EXPECT_EQ(Done(1).status.code(), absl::StatusCode::kDeadlineExceeded);
  peer.ReadUntil(FrameType::kQuiet);
  peer.Say(FrameType::kResult, id_, 1, absl::OkStatus());  // too late: ignored
  ASSERT_OK(ends_.sender->Open(Target(peer.address(), 2, {})));
  ends_.sender->Finish(id_, 2);
  peer.ReadUntil(FrameType::kFinish);
  peer.Say(FrameType::kResult, id_, 2, absl::OkStatus());
  EXPECT_OK(Done(2).status);
  EXPECT_EQ(Done(1).done, 1);
}

TEST_F(KvSenderTest, ReceiverGivesUp) {
  Start();
  Listener peer;
  ASSERT_OK(ends_.sender->Open(Target(peer.address(), 1)));
  peer.Greet(ends_);
  peer.ReadUntil(FrameType::kOpen);
  peer.Say(FrameType::kAbort, id_, 1, absl::CancelledError("enough"));
  EXPECT_EQ(Done(1).status, absl::CancelledError("enough"));
  EXPECT_EQ(peer.ReadUntil(FrameType::kQuiet).epoch, 1u);
  // Nothing more of it is sent, whatever the worker still pushes; and quiet is repeated if asked.
  ends_.PushAll(id_, 1, {1, 2});
  ends_.sender->Finish(id_, 1);
  peer.Say(FrameType::kAbort, id_, 1, absl::CancelledError("enough"));
  EXPECT_EQ(peer.Read().type, FrameType::kQuiet);
  EXPECT_EQ(Done(1).done, 1);
}

TEST_F(KvSenderTest, WorkerGivesUp) {
  Start();
  Listener peer;
  ASSERT_OK(ends_.sender->Open(Target(peer.address(), 1)));
  peer.Greet(ends_);
  peer.ReadUntil(FrameType::kOpen);
  ends_.sender->Abort(id_, 1);
  ends_.sender->Abort(id_, 1);
  EXPECT_EQ(Done(1).status.code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(peer.Read().type, FrameType::kQuiet);
  // While its OPEN is still queued behind a channel that is being made: at once, and the peer, who
  // knows that it never came, hears nothing of it.
  Listener slow;
  ASSERT_OK(ends_.sender->Open(Target(slow.address(), 2)));
  slow.AcceptProof();
  ASSERT_OK(ends_.sender->Open(Target(slow.address(), 3)));
  ends_.sender->Abort(id_, 3);
  EXPECT_EQ(ends_.record.Sent(id_, 3).done, 1);
  EXPECT_EQ(ends_.record.Sent(id_, 3).status.code(), absl::StatusCode::kCancelled);
  slow.Answer(ends_);
  EXPECT_EQ(slow.ReadUntil(FrameType::kOpen).epoch, 2u);
  ends_.sender->Abort(id_, 2);
  const FrameHeader quiet = slow.Read();
  EXPECT_EQ(quiet.type, FrameType::kQuiet);
  EXPECT_EQ(quiet.epoch, 2u);
}

TEST_F(KvSenderTest, AnAbortDoesNotWaitForADial) {
  options().connect_timeout = kPatience;
  Start();
  Listener silent;  // takes the connection, and never answers HELLO
  ASSERT_OK(ends_.sender->Open(Target(silent.address(), 1)));
  silent.Accept();
  ASSERT_OK(ends_.sender->Open(Target(silent.address(), 2)));
  for (uint64_t epoch = 1; epoch <= 2; ++epoch) {
    ends_.sender->Abort(id_, epoch);
    EXPECT_EQ(ends_.record.Sent(id_, epoch).done, 1);
    EXPECT_TRUE(absl::IsCancelled(ends_.record.Sent(id_, epoch).status));
  }
  silent.Close();
}

// The peer's thread waits for a peer that takes nothing, until io_timeout or the kernel (after 11
// s) declare it dead. Nobody who gives up waits for that, and the connection stays good.
TEST_F(KvSenderTest, AnAbortDoesNotWaitForASend) {
  const KvLayout large = {2, 8, 128, 16, DType::kFloat32};  // 131,072 bytes per block and layer
  Ends ends("tcp", large, 256, 256);
  ends.sender_options.io_timeout = kPatience;
  ends.StartSender();
  std::vector<int32_t> blocks(256);
  for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = static_cast<int32_t>(i);
  Listener stuck;
  ASSERT_OK(ends.sender->Open(Target(stuck.address(), 1, blocks)));
  ASSERT_OK(ends.sender->Open(Target(stuck.address(), 2, blocks)));
  stuck.Greet(ends);
  stuck.ReadUntil(FrameType::kOpen);
  stuck.ReadUntil(FrameType::kOpen);
  ends.PushAll(id_, 1, blocks);  // 64 MiB: more than sockets hold
  uint64_t sent = 0;
  for (int same = 0; same < 10;) {  // some frames are out, and for a while no more
    absl::SleepFor(absl::Milliseconds(20));
    const uint64_t before = std::exchange(sent, ends.sender->Counters().bytes);
    same = sent > 0 && sent == before ? same + 1 : 0;
  }
  const absl::Time aborted = absl::Now();
  for (const uint64_t epoch : {1, 2}) {
    ends.sender->Abort(id_, epoch);
    EXPECT_TRUE(absl::IsCancelled(ends.record.AwaitDone(id_, epoch).status));
  }
  EXPECT_LT(absl::Now() - aborted, absl::Seconds(5));
  // The frame that was under way ends, with other bytes.
  EXPECT_EQ(stuck.ReadUntil(FrameType::kQuiet).epoch, 1u);
  EXPECT_EQ(stuck.Read().epoch, 2u);
  ASSERT_OK(ends.sender->Open(Target(stuck.address(), 3, {})));
  EXPECT_EQ(stuck.ReadUntil(FrameType::kOpen).epoch, 3u);
  EXPECT_EQ(ends.record.Sent(id_, 1).done, 1);
}

// The rest of a frame that was given up goes out before the next one, which may be given up too:
// also where that is said while the rest still waits.
TEST(TcpConnection, AFrameIsGivenUpBehindTheRestOfAnother) {
  const auto listener = TcpNetwork()->Listen("127.0.0.1", 0);
  ASSERT_OK(listener);
  const auto sender = TcpNetwork()->Dial((*listener)->address(), kPatience);
  ASSERT_OK(sender);
  const auto peer = (*listener)->Accept(kPatience);
  ASSERT_OK(peer);
  std::atomic<int> asked = 0;
  (*sender)->SetStillWanted([&] {
    ++asked;
    return false;
  });
  const std::vector<std::byte> payload(64 << 20);  // more than sockets hold
  FrameHeader header;
  header.type = FrameType::kData;
  header.ordinal_count = header.layer_count = header.head_count = 1;
  header.payload_bytes = static_cast<uint32_t>(payload.size());
  const auto send = [&] {
    const ConstBytes part = payload;
    return (*sender)->Send(header, {&part, 1}, kPatience);
  };
  (*sender)->Interrupt();  // is remembered: the first wait is told
  EXPECT_TRUE(absl::IsCancelled(send()));
  asked = 0;
  absl::Status second;
  std::thread behind([&] { second = send(); });
  for (const absl::Time begin = absl::Now(); asked == 0 && absl::Now() - begin < kPatience;) {
    absl::SleepFor(absl::Milliseconds(1));
  }
  EXPECT_OK((*peer)->ReceiveHeader(kPatience));
  std::vector<std::byte> came(payload.size());
  EXPECT_OK(ReceiveAll(peer->get(), came, kPatience));
  behind.join();
  EXPECT_TRUE(absl::IsCancelled(second)) << second;
}

TEST_F(KvSenderTest, LostPeerFailsItsTransfersAndTheNextConnects) {
  Start();
  Listener peer;
  ASSERT_OK(ends_.sender->Open(Target(peer.address(), 1)));
  ASSERT_OK(ends_.sender->Open(Target(peer.address(), 2)));
  peer.Greet(ends_);
  peer.ReadUntil(FrameType::kOpen);
  peer.ReadUntil(FrameType::kOpen);
  peer.Close();
  EXPECT_EQ(Done(1).status.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(Done(2).status.code(), absl::StatusCode::kUnavailable);
  ASSERT_OK(ends_.sender->Open(Target(peer.address(), 3)));
  peer.Greet(ends_);
  EXPECT_EQ(peer.ReadUntil(FrameType::kOpen).epoch, 3u);
}

TEST_F(KvSenderTest, AnotherWorkerAtTheAddress) {
  Start();
  Listener peer;
  KvSendTarget target = Target(peer.address(), 1);
  target.peer_worker_id = "decode-5";
  ASSERT_OK(ends_.sender->Open(target));
  peer.Accept();
  EXPECT_EQ(peer.TakeProof().code(), absl::StatusCode::kUnavailable);  // it says nothing more
  EXPECT_THAT(Done(1).status.ToString(), HasSubstr("is worker decode-0, not decode-5"));
}

TEST_F(KvSenderTest, AnImpostorHearsNoHello) {
  options().cluster_secret = "s3cret";
  Start();
  Listener impostor;
  ASSERT_OK(ends_.sender->Open(Target(impostor.address(), 1)));
  impostor.Accept();
  FrameHeader header;
  header.type = FrameType::kChallenge;
  impostor.Reply(header, MakeNonce() + "decode-0");
  EXPECT_EQ(impostor.Read().type, FrameType::kProof);
  header.type = FrameType::kProved;
  impostor.Reply(header, std::string(kProofBytes, 'x'));
  EXPECT_THAT(Done(1).status.ToString(),
              HasSubstr("the receiver does not prove the cluster secret"));
}

TEST_F(KvSenderTest, MalformedPushesFailTheirTransferOnly) {
  Start();
  Listener peer;
  const auto push = [&](uint64_t epoch, int layer, std::vector<int32_t> blocks,
                        std::vector<int32_t> ordinals) {
    EXPECT_OK(ends_.sender->Open(Target(peer.address(), epoch)));
    ends_.sender->Push(id_, epoch, layer, blocks, ordinals);
  };
  push(1, 3, {1}, {0});
  push(2, 0, {32}, {0});
  push(3, 0, {1}, {2});
  push(4, 0, {1, 2}, {0});
  push(5, -1, {1}, {0});
  push(6, 0, {1}, {0});
  ends_.sender->Finish(id_, 6);
  push(7, 0, {}, {});
  EXPECT_OK(ends_.sender->Open(Target(peer.address(), 8, {40})));
  peer.Greet(ends_);
  for (uint64_t epoch = 1; epoch <= 5; ++epoch) {
    EXPECT_EQ(Done(epoch).status.code(), absl::StatusCode::kInvalidArgument) << epoch;
  }
  EXPECT_THAT(Done(6).status.ToString(), HasSubstr("5 pieces never pushed"));
  EXPECT_THAT(Done(8).status.ToString(), HasSubstr("target_blocks[0] must be in [0, 40)"));
  EXPECT_EQ(ends_.record.Sent(id_, 7).done, 0);
}

TEST_F(KvSenderTest, OpenNamesWhatIsWrong) {
  Start();
  const auto error = [&](auto change) {
    KvSendTarget target = Target("127.0.0.1:1", 1);
    change(&target);
    return ends_.sender->Open(target).ToString();
  };
  EXPECT_THAT(
      error([](KvSendTarget* t) { t->transport = "pigeon"; }),
      HasSubstr(
          "kv-transport must be auto or some of cuda_ipc, shm, shm_ring, nccl, tcp, got pigeon"));
  EXPECT_THAT(error([](KvSendTarget* t) { t->transport = "shm"; }),
              HasSubstr("offers transport shm, which is not among this sender's (tcp)"));
  EXPECT_THAT(error([](KvSendTarget* t) { t->address = "nowhere"; }), HasSubstr("nowhere"));
  EXPECT_THAT(error([](KvSendTarget* t) { t->token = "short"; }), HasSubstr("token must have 32"));
  EXPECT_THAT(error([](KvSendTarget* t) { t->target_blocks = {-4}; }), HasSubstr("got -4"));
  Listener peer;
  ASSERT_OK(ends_.sender->Open(Target(peer.address(), 1)));
  EXPECT_EQ(ends_.sender->Open(Target(peer.address(), 1)).code(), absl::StatusCode::kAlreadyExists);
}

TEST_F(KvSenderTest, ClosingFailsWhatIsUnderWay) {
  Start();
  Listener peer;
  ASSERT_OK(ends_.sender->Open(Target(peer.address(), 1)));
  peer.Greet(ends_);
  peer.ReadUntil(FrameType::kOpen);
  ends_.sender.reset();
  EXPECT_EQ(Done(1).status.code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(Done(1).done, 1);
}

TEST_F(KvSenderTest, PeersAreBounded) {
  options().max_peers = 1;
  Start();
  Listener a;
  Listener b;
  ASSERT_OK(ends_.sender->Open(Target(a.address(), 1)));
  EXPECT_EQ(ends_.sender->Open(Target(b.address(), 2)).code(),
            absl::StatusCode::kResourceExhausted);
  ASSERT_OK(ends_.sender->Open(Target(a.address(), 3)));
}

}  // namespace
}  // namespace tandem::kvtransfer
