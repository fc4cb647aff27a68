// A KV transfer over each transport, beside a memcpy and a bare socket that move the same bytes in
// the same run: what tokens, framing, digests and scattering cost. Both ends live in this process;
// over shm the sender still maps the receiver's pool by its descriptor, as another process would.
// Where there are two processors each end has one of its own, as two workers have; left to itself,
// a kernel in a virtual machine often wakes the receiver on the sender's.
//
//   transfer_bench [REPEATS [LAYOUT]]    prints medians: GB/s and, as the last columns, shares of
//                                        memcpy; of the layouts whose name holds LAYOUT
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <sched.h>
#include <string>
#include <sys/mman.h>
#include <thread>
#include <unistd.h>
#include <vector>

#include "absl/synchronization/notification.h"
#include "absl/time/time.h"
#include "spdlog/spdlog.h"

#include "bench/usage.h"
#include "common/base/check.h"
#include "common/base/clock.h"
#include "common/base/locks.h"
#include "kvtransfer/channel/kv_endpoints.h"
#include "kvtransfer/transport/kv_connection.h"

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

// A pair of connected TCP sockets with the project's own settings and framing, but nothing else.
struct BareLink {
  BareLink() {
    auto listener = TcpNetwork()->Listen("127.0.0.1", 0);
    TANDEM_CHECK(listener.ok());
    auto dialed = TcpNetwork()->Dial((*listener)->address(), absl::Seconds(5));
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
      const ConstBytes part(from + done, std::min(kFrame, bytes - done));
      header.payload_bytes = static_cast<uint32_t>(part.size());
      TANDEM_CHECK(sender->Send(header, {&part, 1}, absl::Seconds(5)).ok());
    }
    reader.join();
  }
  std::unique_ptr<KvConnection> sender;
  std::unique_ptr<KvConnection> receiver;
};

// A pool in shared memory, every page touched.
class SharedPool {
 public:
  SharedPool(const KvLayout& layout, int num_blocks, int fill) {
    region_.layout = layout;
    region_.num_blocks = num_blocks;
    region_.fd = memfd_create("transfer-bench", MFD_CLOEXEC);
    TANDEM_CHECK(ftruncate(region_.fd, static_cast<off_t>(region_.TotalBytes())) == 0);
    void* data =
        mmap(nullptr, region_.TotalBytes(), PROT_READ | PROT_WRITE, MAP_SHARED, region_.fd, 0);
    TANDEM_CHECK(data != MAP_FAILED);
    region_.base = static_cast<std::byte*>(data);
    std::memset(region_.base, fill, region_.TotalBytes());
  }
  ~SharedPool() {
    munmap(region_.base, region_.TotalBytes());
    close(region_.fd);
  }
  SharedPool(const SharedPool&) = delete;
  const KvRegion& region() const { return region_; }

 private:
  KvRegion region_;
};

// Puts the calling thread, and threads that it starts from now on, on one of the processors that
// this process may use: the first or the second. Does nothing where there is only one.
void UseProcessor(int which) {
  static const cpu_set_t all = [] {
    cpu_set_t set;
    TANDEM_CHECK(sched_getaffinity(0, sizeof(set), &set) == 0);
    return set;
  }();
  if (CPU_COUNT(&all) < 2) return;
  int cpu = 0;
  for (int left = which; !CPU_ISSET(cpu, &all) || left-- > 0;) ++cpu;
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(cpu, &one);
  TANDEM_CHECK(sched_setaffinity(0, sizeof(one), &one) == 0);
}

// Both ends of one transport over two pools.
class Pair {
 public:
  Pair(const char* transport, const KvRegion& source, const KvRegion& target)
      : transport_(transport) {
    KvReceiverOptions receiver;
    receiver.worker_id = "receiver";
    receiver.region = target;
    receiver.transports = transport;
    receiver.on_sealed = [this](const TransferId&, uint64_t, const TransferStats&) {
      sealed_->Notify();
    };
    receiver.on_failed = [](const TransferId&, uint64_t, const absl::Status& status) {
      TANDEM_CHECK(false, "{}", status.ToString());
    };
    KvSenderOptions sender;
    sender.worker_id = "sender";
    sender.region = source;
    sender.transports = transport;
    sender.slow_link_bytes_per_second = 0;
    UseProcessor(1);
    receiver_ = *KvReceiver::Start(std::move(receiver));
    UseProcessor(0);
    sender_ = *KvSender::Start(std::move(sender));
  }

  // From Expect to on_sealed.
  void Ship(const std::vector<int32_t>& blocks, const std::vector<int32_t>& ordinals, int layers) {
    absl::Notification done;
    sealed_ = &done;
    const TransferId id = TransferId::Random();
    auto token = receiver_->Expect(id, 1, blocks, "");
    TANDEM_CHECK(token.ok());
    TANDEM_CHECK(sender_->Open({id, 1, transport_, receiver_->address(), *token, "", blocks}).ok());
    for (int layer = 0; layer < layers; ++layer) sender_->Push(id, 1, layer, blocks, ordinals);
    sender_->Finish(id, 1);
    TANDEM_CHECK(done.WaitForNotificationWithTimeout(absl::Seconds(30)),
                 "a transfer over {} was not sealed within 30 s", transport_);
  }

 private:
  const std::string transport_;
  absl::Notification* sealed_ = nullptr;
  std::unique_ptr<KvReceiver> receiver_;
  std::unique_ptr<KvSender> sender_;
};

void Run(const std::string& name, const KvLayout& layout, int num_blocks, int repeats) {
  const SharedPool source(layout, num_blocks, 1);
  const SharedPool target(layout, num_blocks, 2);
  const size_t bytes = source.region().TotalBytes();
  std::byte* from = source.region().base;
  std::byte* to = target.region().base;
  Pair tcp("tcp", source.region(), target.region());
  Pair shm("shm", source.region(), target.region());
  BareLink bare;

  // Every other block, so that neither side is one contiguous copy.
  std::vector<int32_t> blocks;
  for (int parity = 0; parity < 2; ++parity) {
    for (int block = parity; block < num_blocks; block += 2) blocks.push_back(block);
  }
  std::vector<int32_t> ordinals(blocks.size());
  for (size_t i = 0; i < ordinals.size(); ++i) ordinals[i] = static_cast<int32_t>(i);

  std::vector<double> copy, socket, over_tcp, over_shm;
  for (int repeat = 0; repeat <= repeats; ++repeat) {
    const double seconds[] = {
        Seconds([&] { std::memcpy(to, from, bytes); }),
        Seconds([&] { bare.Move(from, to, bytes); }),
        Seconds([&] { tcp.Ship(blocks, ordinals, layout.num_layers); }),
        Seconds([&] { shm.Ship(blocks, ordinals, layout.num_layers); }),
    };
    if (repeat == 0) continue;  // connects, and maps the memory
    copy.push_back(seconds[0]);
    socket.push_back(seconds[1]);
    over_tcp.push_back(seconds[2]);
    over_shm.push_back(seconds[3]);
  }
  const auto rate = [&](const std::vector<double>& times) {
    return static_cast<double>(bytes) / Median(times) / 1e9;
  };
  std::printf("%-22s %7.2f MB %7.2f %7.2f %7.2f %7.2f   %5.2f %5.2f   %8.0f %8.0f\n", name.c_str(),
              static_cast<double>(bytes) / 1e6, rate(copy), rate(socket), rate(over_tcp),
              rate(over_shm), rate(over_tcp) / rate(copy), rate(over_shm) / rate(copy),
              Median(over_tcp) * 1e6, Median(over_shm) * 1e6);
}

}  // namespace
}  // namespace tandem::kvtransfer

int main(int argc, char** argv) {
  tandem::WatchNoLockOrders();  // as the programs do
  if (tandem::AnswerHelp(argc, argv, "transfer_bench [REPEATS]")) {
    return 0;
  }
  using tandem::DType;
  using tandem::KvLayout;
  using tandem::kvtransfer::Run;
  spdlog::set_level(spdlog::level::warn);
  const int repeats = argc > 1 ? std::max(1, std::atoi(argv[1])) : 9;
  std::printf("%-22s %10s %7s %7s %7s %7s   %5s %5s   %8s %8s\n", "layout", "bytes", "memcpy",
              "socket", "tcp", "shm", "t/cpy", "s/cpy", "tcp us", "shm us");
  // Layers, kv heads, head dim, block size.
  const std::string wanted = argc > 2 ? argv[2] : "";
  const auto run = [&](const std::string& name, const KvLayout& layout, int num_blocks,
                       int how_often) {
    if (name.find(wanted) != std::string::npos) Run(name, layout, num_blocks, how_often);
  };
  run("demo, 1 block", {4, 2, 32, 16, DType::kBFloat16}, 1, 10 * repeats);
  run("0.5B, 1 block", {24, 2, 64, 16, DType::kBFloat16}, 1, 10 * repeats);
  run("0.5B, 64 tokens", {24, 2, 64, 16, DType::kBFloat16}, 4, repeats);
  run("0.5B, 1,024 tokens", {24, 2, 64, 16, DType::kBFloat16}, 64, repeats);
  run("7B, 256 tokens", {28, 4, 128, 16, DType::kBFloat16}, 16, repeats);
  run("7B, 1,024 tokens", {28, 4, 128, 16, DType::kBFloat16}, 64, repeats);
  run("7B, 4,096 tokens", {28, 4, 128, 16, DType::kBFloat16}, 256, repeats);
  return 0;
}
