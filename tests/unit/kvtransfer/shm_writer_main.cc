// A sender of its own process for shm_process_test: ships a pool full of 0xab into blocks
// FIRST_BLOCK..FIRST_BLOCK+N-1, and
// stops itself (SIGSTOP) between a look at its grant and the copy that it allows, if told so.
//
//   kv_shm_writer ADDRESS TRANSFER_HEX EPOCH TOKEN_HEX TRANSPORTS FIRST_BLOCK NUM_BLOCKS STOP_AT
//                 STORE [UID]
//
// STOP_AT: before which block's copy to stop, -1: never. STORE: where the pool lies, "host" or
// "card". Prints the transport and the status code
// of the transfer when it is over, and ends then.
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <string>
#include <unistd.h>

#include "absl/strings/escaping.h"
#include "absl/synchronization/notification.h"
#include "spdlog/spdlog.h"

#include "kvtransfer/store/host_store.h"
#include "tests/unit/kvtransfer/endpoint_fixture.h"

namespace tandem::kvtransfer {
namespace {

// `Base`: HostStore or CardStore.
template <typename Base>
class StoppingStore : public Base {
 public:
  StoppingStore(const KvRegion& region, int stop_at) : Base(region), stop_at_(stop_at) {}

  bool CopyRun(const BlockRun& run, const KvPoolShape& target, std::byte* to, CopyMode mode,
               std::span<uint64_t> digests, absl::FunctionRef<bool()> go_on) const override {
    for (int l = 0; l < run.layer_count; ++l) {
      for (size_t i = 0; i < run.source_blocks.size(); ++i) {
        if (!go_on()) return false;
        if (copies_++ == stop_at_) raise(SIGSTOP);  // allowed already, not written yet
        const BlockRun one = {run.layer_begin + l, 1, run.heads, run.source_blocks.subspan(i, 1),
                              run.target_blocks.subspan(i, 1)};
        HostStore::CopyRun(one, target, to, mode, digests.subspan(i, 1), [] { return true; });
      }
    }
    return true;
  }

  // Into a ring, whose frames several blocks share: stops before the pages of the block are there.
  void GatherRun(const BlockRun& run, std::byte* to, std::span<uint64_t> digests) const override {
    for (int l = 0; l < run.layer_count; ++l) {
      for (size_t i = 0; i < run.source_blocks.size(); ++i) {
        if (copies_++ == stop_at_) raise(SIGSTOP);
        const BlockRun one = {
            run.layer_begin + l, 1, run.heads, run.source_blocks.subspan(i, 1), {}};
        HostStore::GatherRun(one, to, digests.subspan(i, 1));
        to += one.Bytes(this->shape().layout);
      }
    }
  }

 private:
  const int stop_at_;
  mutable int copies_ = 0;  // of one thread at a time
};

int Main(char** argv) {
  if (argv[10] != nullptr && setuid(static_cast<uid_t>(std::atoi(argv[10]))) != 0) return 2;
  spdlog::set_level(spdlog::level::off);  // stdout is the test's
  TransferId id;
  if (!TransferId::FromBytes(absl::HexStringToBytes(argv[2]), &id)) return 2;
  const auto epoch = static_cast<uint64_t>(std::atoll(argv[3]));
  const int num_blocks = std::atoi(argv[7]);
  TestPool pool(SmallLayout(), num_blocks);
  pool.Fill(std::byte{0xab});
  const int stop_at = std::atoi(argv[8]);
  const StoppingStore<HostStore> host(pool.region(), stop_at);
  const StoppingStore<CardStore> card(pool.region(), stop_at);

  absl::Notification over;
  KvSenderOptions options;
  options.store = argv[9] == std::string("card") ? static_cast<const KvStore*>(&card) : &host;
  options.worker_id = "prefill-0";
  options.capability_digest = "cap";
  options.transports = argv[5];
  options.slow_link_bytes_per_second = 0;
  options.on_done = [&](const TransferId&, uint64_t, const absl::Status& status,
                        const TransferStats& stats) {
    std::printf("%s %d\n", stats.transport.c_str(), static_cast<int>(status.code()));
    over.Notify();
  };
  auto sender = KvSender::Start(std::move(options));
  if (!sender.ok()) return 2;
  std::vector<int32_t> blocks(static_cast<size_t>(num_blocks));
  std::iota(blocks.begin(), blocks.end(), 0);
  std::vector<int32_t> target_blocks = blocks;
  for (int32_t& block : target_blocks) block += std::atoi(argv[6]);
  const KvSendTarget target = {
      id, epoch, argv[5], argv[1], absl::HexStringToBytes(argv[4]), "decode-0", target_blocks};
  if (!(*sender)->Open(target).ok()) return 2;
  for (int layer = 0; layer < SmallLayout().num_layers; ++layer) {
    (*sender)->Push(id, epoch, layer, blocks, blocks);
  }
  (*sender)->Finish(id, epoch);
  over.WaitForNotification();
  return 0;
}

}  // namespace
}  // namespace tandem::kvtransfer

int main(int argc, char** argv) { return argc < 10 ? 2 : tandem::kvtransfer::Main(argv); }
