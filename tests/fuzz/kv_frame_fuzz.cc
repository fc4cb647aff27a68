// A KV receiver's connection fed by an attacker who knows the protocol: frames with right checksums
// and any fields, some with the right token. Whatever comes, only the blocks of the expected
// transfer may change, and nothing is read or written outside the pool (the address sanitizer sees
// to that).
#include <algorithm>
#include <cstring>
#include <vector>

#include "spdlog/spdlog.h"

#include "common/auth/proof.h"
#include "common/base/check.h"
#include "common/base/status.h"
#include "kvtransfer/channel/hello.h"
#include "kvtransfer/channel/receiver_link.h"
#include "kvtransfer/channel/registered_transport.h"
#include "kvtransfer/channel/transfer_table.h"

namespace tandem::kvtransfer {
namespace {

constexpr int kNumBlocks = 6;
const KvLayout kLayout = {2, 1, 4, 16, DType::kFloat16};  // 256 bytes per block and layer

// Takes values from the fuzzer's input; zeros when it is used up.
class Input {
 public:
  Input(const uint8_t* data, size_t size) : rest_(data, size) {}
  bool empty() const { return rest_.empty(); }
  uint8_t Byte() {
    if (rest_.empty()) return 0;
    const uint8_t value = rest_.front();
    rest_ = rest_.subspan(1);
    return value;
  }
  std::string Bytes(size_t size) {
    const size_t n = std::min(size, rest_.size());
    std::string out(reinterpret_cast<const char*>(rest_.data()), n);
    rest_ = rest_.subspan(n);
    return out;
  }

 private:
  std::span<const uint8_t> rest_;
};

void AppendFrame(FrameHeader header, const std::string& payload, std::string* out) {
  header.payload_digest = PayloadDigest(std::as_bytes(std::span(payload)));
  const EncodedHeader encoded = EncodeHeader(header);
  out->append(reinterpret_cast<const char*>(encoded.data()), encoded.size());
  out->append(payload);
}

// Everything the peer will ever say is here already; then it closes.
class MemoryConnection : public KvConnection {
 public:
  explicit MemoryConnection(std::string bytes) : bytes_(std::move(bytes)) {}
  // Answers the challenge: the attacker knows the secret, or there would be nothing to see.
  absl::Status Send(const FrameHeader& header, std::span<const ConstBytes> payload,
                    absl::Duration) override {
    if (header.type != FrameType::kChallenge) return absl::OkStatus();
    const std::string challenge(reinterpret_cast<const char*>(payload[0].data()),
                                payload[0].size());
    const std::string nonce(kNonceBytes, 'n');
    const std::string answer =
        Prove("", ProofPurpose::kKvSender,
              {"fuzz", nonce, challenge.substr(kNonceBytes), challenge.substr(0, kNonceBytes)}) +
        nonce + "fuzz";
    FrameHeader proof;
    proof.type = FrameType::kProof;
    proof.payload_bytes = static_cast<uint32_t>(answer.size());
    std::string frame;
    AppendFrame(proof, answer, &frame);
    bytes_.insert(at_, frame);
    return absl::OkStatus();
  }
  absl::StatusOr<FrameHeader> ReceiveHeader(absl::Duration) override {
    EncodedHeader header;
    if (bytes_.size() - at_ < header.size()) return Unavailable("end");
    std::memcpy(header.data(), bytes_.data() + at_, header.size());
    at_ += header.size();
    return DecodeHeader(header);
  }
  absl::StatusOr<size_t> ReceiveSome(std::span<const MutableBytes> into) override {
    if (at_ == bytes_.size()) return Unavailable("end");
    size_t total = 0;
    for (const MutableBytes& part : into) {
      const size_t n = std::min(part.size(), bytes_.size() - at_);
      std::memcpy(part.data(), bytes_.data() + at_, n);
      at_ += n;
      total += n;
    }
    return total;
  }
  absl::Status WaitReadable(absl::Duration) override { return absl::OkStatus(); }
  absl::Status WaitReadableOrInterrupt(absl::Duration) override { return absl::OkStatus(); }
  void Interrupt() override {}
  void Shutdown() override {}
  const std::string& peer() const override { return peer_; }

 private:
  const std::string peer_ = "fuzz";
  std::string bytes_;
  size_t at_ = 0;
};

std::string Conversation(Input* input, const TransferId& id, const std::string& token) {
  std::string out;
  FrameHeader hello;
  std::string greeting = EncodeHello({"fuzz", "cap", {kLayout, kNumBlocks}, {{"tcp", ""}}});
  if (input->Byte() == 0xff) greeting = input->Bytes(40);
  hello.payload_bytes = static_cast<uint32_t>(greeting.size());
  AppendFrame(hello, greeting, &out);
  if (input->Byte() != 0xff) {
    FrameHeader select;
    select.type = FrameType::kSelect;
    select.payload_bytes = 3;
    AppendFrame(select, "tcp", &out);
  }
  while (!input->empty()) {
    const uint8_t how = input->Byte();
    FrameHeader header;
    header.type = static_cast<FrameType>(input->Byte() % 25);
    if ((how & 1) == 0) header.id = id;
    header.epoch = (how >> 1) & 1;
    header.ordinal_begin = input->Byte() % 5;
    header.ordinal_count = input->Byte() % 5;
    header.layer_begin = input->Byte() % 4;
    header.layer_count = input->Byte() % 4;
    const uint8_t heads = input->Byte();
    header.head_begin = heads >= 0xf0 ? heads & 3u : 0;
    header.head_count = heads >= 0xf0 ? (heads >> 2) & 3u : 1;
    std::string payload;
    if (header.type == FrameType::kOpen) {
      header.ordinal_count = (how & 4) != 0 ? header.ordinal_count : 2;
      payload = (how & 8) != 0 ? input->Bytes(kKvTokenBytes) : token;
    } else if (header.type == FrameType::kData && (how & 4) == 0) {
      payload.assign(
          header.ordinal_count * header.layer_count * header.head_count * kLayout.BlockLayerBytes(),
          static_cast<char>(input->Byte()));
    } else {
      payload = input->Bytes(input->Byte());
    }
    header.payload_bytes = static_cast<uint32_t>(payload.size());
    if ((how & 16) != 0) header.payload_bytes = input->Byte() * 65793u;
    AppendFrame(header, payload, &out);
  }
  return out;
}

}  // namespace
}  // namespace tandem::kvtransfer

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace tandem::kvtransfer;
  using tandem::Hash128;
  using tandem::TransferId;
  spdlog::set_level(spdlog::level::off);
  Input input(data, size);
  // Raw decoders first: any bytes, any length.
  (void)DecodeHello(std::as_bytes(std::span(data, size)));
  if (size >= kFrameHeaderBytes) {
    EncodedHeader raw;
    std::memcpy(raw.data(), data, raw.size());
    (void)DecodeHeader(raw);
  }

  std::vector<std::byte> memory(kLayout.BlockBytes() * kNumBlocks, std::byte{0xee});
  int sealed = 0;
  int failed = 0;
  int quiet = 0;
  KvReceiverOptions options;
  options.region = {memory.data(), kLayout, kNumBlocks};
  options.on_sealed = [&](const TransferId&, uint64_t, const TransferStats&) { ++sealed; };
  options.on_failed = [&](const TransferId&, uint64_t, const absl::Status&) { ++failed; };
  options.on_quiet = [&](const TransferId&, uint64_t) { ++quiet; };
  KvCounterBlock counters;
  TransferTable table(kNumBlocks);
  const auto store = *MakeKvStore(options.region);
  const auto transports = *RegisterTransports("tcp", store.get(), {});
  const ReceiverContext context = {&options, store.get(), &counters, &table};
  const Hello here = {"receiver", "cap", store->shape(), {}};
  const TransferId id = {Hash128{1, 2}};
  const std::string token(kKvTokenBytes, 'k');
  const std::vector<int32_t> blocks = {4, 1};
  auto transfer =
      std::make_shared<IncomingTransfer>(TransferKey{id, 0}, blocks, token, "", &context);
  TANDEM_CHECK(table.Insert(transfer).ok());

  ReceiverLink link(std::make_shared<MemoryConnection>(Conversation(&input, id, token)), &context,
                    &here, transports, [] {});
  link.Run();
  transfer->Close();
  TANDEM_CHECK(quiet == 1 && sealed + failed == 1, "quiet {} sealed {} failed {}", quiet, sealed,
               failed);
  for (const int block : {0, 2, 3, 5}) {
    for (int layer = 0; layer < kLayout.num_layers; ++layer) {
      const std::byte* bytes = options.region.Block(layer, block);
      TANDEM_CHECK(std::all_of(bytes, bytes + kLayout.BlockLayerBytes(),
                               [](std::byte b) { return b == std::byte{0xee}; }),
                   "block {} was written", block);
    }
  }
  return 0;
}
