// A sender of its own process for cuda_ipc_test, with a pool of random bytes on the card.
//
//   cuda_ipc_writer LAYOUT NUM_BLOCKS SEED TRANSPORTS
//
// Ships for every line of its input, which is
//   ADDRESS TRANSFER_HEX EPOCH TOKEN_HEX COUNT SOURCE TARGET PAUSE_US
// COUNT blocks from SOURCE on to those from TARGET on, with a pause before each layer, and prints
// the transport, the status code and the microseconds that it took.
#include <chrono>
#include <iostream>
#include <numeric>
#include <string>
#include <thread>

#include "absl/strings/escaping.h"
#include "absl/synchronization/notification.h"
#include "spdlog/spdlog.h"

#include "tests/gpu/card_pool.h"

namespace tandem::kvtransfer {
namespace {

int Main(char** argv) {
  spdlog::set_level(spdlog::level::off);  // stdout is the test's
  TestPool host(IpcLayout(std::atoi(argv[1])), std::atoi(argv[2]));
  host.FillRandom(static_cast<uint64_t>(std::atoll(argv[3])));
  const CardPool pool(host);
  Record record;
  KvSenderOptions options;
  options.region = pool.region();
  options.worker_id = "prefill-0";
  options.capability_digest = "cap";
  options.transports = argv[4];
  options.slow_link_bytes_per_second = 0;
  record.Attach(&options);
  auto sender = KvSender::Start(std::move(options));
  if (!sender.ok()) return 2;
  std::string address, id_hex, token;
  uint64_t epoch = 0;
  int count = 0, source = 0, target = 0, pause = 0;
  while (std::cin >> address >> id_hex >> epoch >> token >> count >> source >> target >> pause) {
    TransferId id;
    if (!TransferId::FromBytes(absl::HexStringToBytes(id_hex), &id)) return 2;
    std::vector<int32_t> from(static_cast<size_t>(count)), to(from.size()), ordinals(from.size());
    std::iota(from.begin(), from.end(), source);
    std::iota(to.begin(), to.end(), target);
    std::iota(ordinals.begin(), ordinals.end(), 0);
    const auto begin = std::chrono::steady_clock::now();
    if (!(*sender)
             ->Open({id, epoch, argv[4], address, absl::HexStringToBytes(token), "decode-0", to})
             .ok()) {
      return 2;
    }
    for (int layer = 0; layer < host.region().layout.num_layers; ++layer) {
      if (pause > 0) std::this_thread::sleep_for(std::chrono::microseconds(pause));
      (*sender)->Push(id, epoch, layer, from, ordinals);
    }
    (*sender)->Finish(id, epoch);
    const Record::Sender sent = record.AwaitDone(id, epoch);
    const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - begin;
    if (!sent.status.ok()) std::cerr << "writer: " << sent.status << std::endl;
    const bool connected = !sent.stats.transport.empty();
    std::cout << (connected ? sent.stats.transport : "none") << ' '
              << static_cast<int>(sent.status.code()) << ' ' << static_cast<int64_t>(took.count())
              << std::endl;
  }
  return 0;
}

}  // namespace
}  // namespace tandem::kvtransfer

int main(int argc, char** argv) { return argc < 5 ? 2 : tandem::kvtransfer::Main(argv); }
