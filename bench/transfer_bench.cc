// Throughput of a KV transfer over loopback TCP, beside a memcpy and a bare socket that move the
// same bytes in the same run: what tokens, framing, digests and scattering cost.
//
//   transfer_bench [REPEATS]    prints medians in GB/s
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#include "absl/synchronization/notification.h"
#include "spdlog/spdlog.h"

#include "common/base/check.h"
#include "common/base/clock.h"
#include "kvtransfer/channel/kv_endpoints.h"
#include "kvtransfer/transport/kv_transport.h"

namespace tandem::kvtransfer {
namespace {

double Seconds(const std::function<void()>& work) {
  const absl::Time start = Clock::Real()->Now();
  work();
  return absl::ToDoubleSeconds(Clock::Real()->Now() - start);
}

double Median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<ptrdiff_t>(values.size() / 2),
                   values.end());
  return values[values.size() / 2];
}

// A pair of connected TCP sockets with the transport's own settings and framing, but nothing else.
struct BareLink {
  BareLink() {
    auto listener = TcpTransport()->Listen("127.0.0.1", 0);
    TANDEM_CHECK(listener.ok());
    auto dialed = TcpTransport()->Dial((*listener)->address(), absl::Seconds(5));
    auto accepted = (*listener)->Accept(absl::Seconds(5));
    TANDEM_CHECK(dialed.ok() && accepted.ok());
    sender = *std::move(dialed);
    receiver = *std::move(accepted);
  }
  // Moves `bytes` in frames of 1 MiB and waits until they are there.
  void Move(const std::byte* from, std::byte* to, size_t bytes) {
    constexpr size_t kFrame = 1 << 20;
    std::thread reader([&] {
      for (size_t done = 0; done < bytes; done += kFrame) {
        TANDEM_CHECK(receiver->ReceiveHeader(absl::Seconds(5)).ok());
        const size_t n = std::min(kFrame, bytes - done);
        TANDEM_CHECK(ReceiveAll(receiver.get(), {to + done, n}, absl::Seconds(5)).ok());
      }
    });
    FrameHeader header;
    header.type = FrameType::kData;
    for (size_t done = 0; done < bytes; done += kFrame) {
      const KvPiece piece = {from + done, std::min(kFrame, bytes - done), 0};
      header.payload_bytes = static_cast<uint32_t>(piece.bytes);
      TANDEM_CHECK(sender->Send(header, {&piece, 1}, absl::Seconds(5)).ok());
    }
    reader.join();
  }
  std::unique_ptr<KvConnection> sender;
  std::unique_ptr<KvConnection> receiver;
};

void Run(const char* name, const KvLayout& layout, int num_blocks, int repeats) {
  const size_t bytes = layout.BlockBytes() * static_cast<size_t>(num_blocks);
  std::vector<std::byte> source(bytes, std::byte{1});
  std::vector<std::byte> target(bytes, std::byte{2});
  absl::Notification* sealed = nullptr;
  KvReceiverOptions receiver_options;
  receiver_options.region = {target.data(), layout, num_blocks};
  receiver_options.on_sealed = [&](const TransferId&, uint64_t, const TransferStats&) {
    sealed->Notify();
  };
  KvSenderOptions sender_options;
  sender_options.region = {source.data(), layout, num_blocks};
  auto receiver = KvReceiver::Start(receiver_options);
  auto sender = KvSender::Start(sender_options);
  TANDEM_CHECK(receiver.ok() && sender.ok());
  BareLink bare;

  // Every other block, so that neither side is one contiguous copy.
  std::vector<int32_t> blocks;
  for (int parity = 0; parity < 2; ++parity) {
    for (int block = parity; block < num_blocks; block += 2) blocks.push_back(block);
  }
  std::vector<int32_t> ordinals(blocks.size());
  for (size_t i = 0; i < ordinals.size(); ++i) ordinals[i] = static_cast<int32_t>(i);

  std::vector<double> copy, socket, transfer;
  for (int repeat = 0; repeat <= repeats; ++repeat) {
    const double copied = Seconds([&] { std::memcpy(target.data(), source.data(), bytes); });
    const double sent = Seconds([&] { bare.Move(source.data(), target.data(), bytes); });
    const double shipped = Seconds([&] {
      absl::Notification done;
      sealed = &done;
      const TransferId id = TransferId::Random();
      auto token = (*receiver)->Expect(id, 1, blocks);
      TANDEM_CHECK(token.ok());
      TANDEM_CHECK(
          (*sender)->Open({id, 1, "tcp", (*receiver)->address(), *token, "", blocks}).ok());
      for (int layer = 0; layer < layout.num_layers; ++layer) {
        (*sender)->Push(id, 1, layer, blocks, ordinals);
      }
      (*sender)->Finish(id, 1);
      done.WaitForNotification();
    });
    if (repeat == 0) continue;  // connects, and touches the memory
    copy.push_back(static_cast<double>(bytes) / copied / 1e9);
    socket.push_back(static_cast<double>(bytes) / sent / 1e9);
    transfer.push_back(static_cast<double>(bytes) / shipped / 1e9);
  }
  std::printf("%-28s %8.2f MB %8.2f %8.2f %8.2f   %5.2f %5.2f\n", name,
              static_cast<double>(bytes) / 1e6, Median(copy), Median(socket), Median(transfer),
              Median(transfer) / Median(copy), Median(transfer) / Median(socket));
}

}  // namespace
}  // namespace tandem::kvtransfer

int main(int argc, char** argv) {
  using namespace tandem;
  using namespace tandem::kvtransfer;
  spdlog::set_level(spdlog::level::warn);
  const int repeats = argc > 1 ? std::max(1, std::atoi(argv[1])) : 9;
  std::printf("%-28s %11s %8s %8s %8s   %5s %5s\n", "layout", "bytes", "memcpy", "socket", "kv",
              "/copy", "/sock");
  // Layers, kv heads, head dim, block size.
  Run("demo, 2 blocks", {4, 2, 32, 16, DType::kBFloat16}, 2, repeats);
  Run("0.5B, 64 tokens", {24, 2, 64, 16, DType::kBFloat16}, 4, repeats);
  Run("0.5B, 1,024 tokens", {24, 2, 64, 16, DType::kBFloat16}, 64, repeats);
  Run("7B, 256 tokens", {28, 4, 128, 16, DType::kBFloat16}, 16, repeats);
  Run("7B, 4,096 tokens", {28, 4, 128, 16, DType::kBFloat16}, 256, repeats);
  return 0;
}
