// A sender by hand, for tests of the receiver: it says what no well-behaved sender would.
#pragma once

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>
#include <netinet/in.h>
#include <optional>
#include <span>
#include <string>
#include <sys/socket.h>
#include <unistd.h>
#include <utility>
#include <vector>

#include "gtest/gtest.h"

#include "common/auth/proof.h"
#include "common/base/host_port.h"
#include "kvtransfer/channel/hello.h"
#include "kvtransfer/store/page_digest.h"
#include "kvtransfer/transport/frame.h"
#include "kvtransfer/transport/posix_fd.h"
#include "kvtransfer/transport/shm_control.h"
#include "kvtransfer/transport/unix_rendezvous.h"
#include "tests/support/paths.h"
#include "tests/unit/kvtransfer/endpoint_fixture.h"

namespace tandem::kvtransfer {

inline constexpr int kHeads = 2;  // of SmallLayout()

struct KeyLess {
  bool operator()(const std::pair<TransferId, uint64_t>& a,
                  const std::pair<TransferId, uint64_t>& b) const {
    return TransferKey{a.first, a.second}.ToString() < TransferKey{b.first, b.second}.ToString();
  }
};

// A sender by hand, over a plain blocking socket.
class Speaker {
 public:
  explicit Speaker(const Ends& ends) : ends_(ends), transport_(ends.receiver_options.transports) {
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
    return {"prefill-9", "cap", ShapeOf(ends_.source.region()), {{transport_, ""}}};
  }
  // Answers the challenge with what `secret` gives; the receiver's answer.
  FrameHeader ProveSecret(const std::string& secret = "", const std::string& id = "prefill-9") {
    std::string challenge;
    EXPECT_EQ(Read(&challenge).type, FrameType::kChallenge);
    const std::string nonce = MakeNonce();
    proof_ = Prove(secret, ProofPurpose::kKvSender,
                   {id, nonce, challenge.substr(kNonceBytes), challenge.substr(0, kNonceBytes)}) +
             nonce + id;
    return Present(proof_);
  }
  FrameHeader Present(const std::string& proof) {
    Control(Header(FrameType::kProof, {}, 0), proof);
    return Read();
  }
  // What the last ProveSecret sent.
  const std::string& proof() const { return proof_; }
  FrameHeader SayHello(const Hello& hello, std::string* reply) {
    EXPECT_EQ(ProveSecret("", hello.worker_id).type, FrameType::kProved);
    Control(FrameHeader{}, EncodeHello(hello));  // a default header is a HELLO
    return Read(reply);
  }
  void Greet() {
    std::string reply;
    EXPECT_EQ(SayHello(OwnHello(), &reply).type, FrameType::kHelloOk);
    const auto peer = DecodeHello(std::as_bytes(std::span(reply)));
    ASSERT_OK(peer);
    ASSERT_EQ(peer->transports.size(), 1u);
    const std::string& advert = peer->transports[0].advert;
    Fd socket;
    if (shm()) socket = *ConnectToPeer(advert.substr(advert.find(' ') + 1));
    Control(Header(FrameType::kSelect, {}, 0), transport_);
    const FrameHeader selected = Read();
    EXPECT_EQ(selected.type, FrameType::kSelected);
    EXPECT_EQ(selected.code, 0u);
    if (!shm()) return;
    const SharedPool pool = *ReceivePool(socket.get(), kPatience);
    pool_ = *SharedMapping::Map(pool.fds[0], pool.pool_bytes);
    control_ = *SharedMapping::Map(pool.fds[1], kShmControlBytes);
    for (const int fd : pool.fds) close(fd);
  }
  bool shm() const { return transport_ == "shm"; }
  // One-sided: as a writer says, whatever became of its connection, that it has ended.
  void Detach() { reinterpret_cast<ShmControlPage*>(control_.data())->detached.store(1); }
  void Open(const KvSendTarget& target) {
    FrameHeader header = Header(FrameType::kOpen, target.id, target.epoch);
    header.ordinal_count = static_cast<uint32_t>(target.target_blocks.size());
    Control(header, target.token);
    target_blocks_[{target.id, target.epoch}] = target.target_blocks;
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
    header.head_count = kHeads;
    header.payload_bytes = static_cast<uint32_t>(piece.size());
    const std::span<const std::byte> written = piece.first(std::min(piece.size(), cut));
    if (!shm()) return Send(header, written);
    // Into the pool, where a transfer of this speaker has its block; then the header.
    const auto it = target_blocks_.find({id, epoch});
    if (it != target_blocks_.end() && ordinal < it->second.size()) {
      const KvPoolShape shape = ShapeOf(ends_.target.region());
      const uint64_t to = shape.BlockOffset(static_cast<int>(layer), it->second[ordinal]);
      std::copy(written.begin(), written.end(), pool_.data() + to);
    }
    if (written.size() == piece.size()) Send(header, {});
  }
  void Send(const FrameHeader& header, std::span<const std::byte> payload) {
    Write(EncodeHeader(header));
    Write(payload);
  }
  std::span<const std::byte> Piece(uint32_t layer, int source_block) const {
    const KvRegion& region = ends_.source.region();
    return {region.Block(static_cast<int>(layer), source_block), region.layout.BlockLayerBytes()};
  }
  std::span<const std::byte> Page(int layer, int block, PageKind kind, int head) const {
    const KvPoolShape shape = ShapeOf(ends_.source.region());
    return {ends_.source.region().base + shape.PageOffset(layer, block, kind, head),
            shape.layout.PageBytes()};
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
              uint64_t spoil = 0, const HeadRange& heads = {0, kHeads}) {
    std::vector<uint64_t> digests;
    for (const int32_t block : source_blocks) {
      uint64_t digest = 0;
      for (int layer = 0; layer < SmallLayout().num_layers; ++layer) {
        for (const PageKind kind : {PageKind::kKey, PageKind::kValue}) {
          for (int head = heads.begin; head < heads.end(); ++head) {
            digest ^= PageDigest(Page(layer, block, kind, head), layer, kind, head);
          }
        }
      }
      digests.push_back(digest);
    }
    if (!digests.empty()) digests[0] ^= spoil;
    FrameHeader header = Header(FrameType::kFinish, id, epoch);
    header.head_begin = static_cast<uint32_t>(heads.begin);
    header.head_count = static_cast<uint32_t>(heads.count);
    Control(header, {reinterpret_cast<const char*>(digests.data()), 8 * digests.size()});
  }
  // Returns when the receiver has handled everything before; eats one reply.
  void AwaitHandled() {
    Data(TransferId::Random(), 1, 0, 0, 1);
    EXPECT_EQ(Read().type, FrameType::kAbort);
  }
  void Quiet(const TransferId& id, uint64_t epoch) {
    Control(Header(FrameType::kQuiet, id, epoch), "test");
  }
  FrameHeader Read(std::string* payload) {
    const auto header = TryRead(payload);
    EXPECT_TRUE(header.has_value()) << "connection closed";
    return header.value_or(FrameHeader{});
  }
  // The next frame but for OPENED.
  FrameHeader Read() {
    std::string ignored;
    FrameHeader header = Read(&ignored);
    while (header.type == FrameType::kOpened) header = Read(&ignored);
    return header;
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
  const std::string transport_;
  SharedMapping pool_;
  SharedMapping control_;
  std::map<std::pair<TransferId, uint64_t>, std::vector<int32_t>, KeyLess> target_blocks_;
  std::string proof_;
  int fd_ = -1;
  bool closed_ = false;
};

}  // namespace tandem::kvtransfer
