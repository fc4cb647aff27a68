// Pools, and recorders of what endpoints call back, for tests of the two ends together.
#pragma once

#include <algorithm>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <sys/mman.h>
#include <thread>
#include <unistd.h>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "gtest/gtest.h"

#include "kvtransfer/channel/kv_endpoints.h"
#include "kvtransfer/channel/transfer_key.h"
#include "kvtransfer/store/host_store.h"
#include "kvtransfer/transport/shm_control.h"

namespace tandem::kvtransfer {

// Far above what anything here takes: it only turns a hang into a failure.
inline constexpr absl::Duration kPatience = absl::Seconds(60);

inline KvLayout SmallLayout() { return KvLayout{3, 2, 8, 16, DType::kBFloat16}; }

// A pool with its memory, which other processes can map.
class TestPool {
 public:
  TestPool(const KvLayout& layout, int num_blocks, int first_kv_head = 0) {
    region_.layout = layout;
    region_.num_blocks = num_blocks;
    region_.first_kv_head = first_kv_head;
    region_.fd = memfd_create("tandem-test-pool", MFD_CLOEXEC);
    EXPECT_EQ(ftruncate(region_.fd, static_cast<off_t>(region_.TotalBytes())), 0);
    void* data =
        mmap(nullptr, region_.TotalBytes(), PROT_READ | PROT_WRITE, MAP_SHARED, region_.fd, 0);
    EXPECT_NE(data, MAP_FAILED);
    region_.base = static_cast<std::byte*>(data);
    Fill(std::byte{0xee});
  }
  ~TestPool() {
    munmap(region_.base, region_.TotalBytes());
    close(region_.fd);
  }
  TestPool(const TestPool&) = delete;

  const KvRegion& region() const { return region_; }
  std::span<std::byte> memory() const { return {region_.base, region_.TotalBytes()}; }
  void FillRandom(uint64_t seed) {
    std::mt19937_64 random(seed);
    for (std::byte& b : memory()) b = static_cast<std::byte>(random());
  }
  void Fill(std::byte value) { std::fill(memory().begin(), memory().end(), value); }
  std::string BlockBytes(int block) const {
    std::string out;
    for (int layer = 0; layer < region_.layout.num_layers; ++layer) {
      out.append(reinterpret_cast<const char*>(region_.Block(layer, block)),
                 region_.layout.BlockLayerBytes());
    }
    return out;
  }

 private:
  KvRegion region_;
};

// What callbacks said, by transfer. Thread-safe.
class Record {
 public:
  struct Receiver {
    int sealed = 0;
    int failed = 0;
    int quiet = 0;
    absl::Status status;
    TransferStats stats;
  };
  struct Sender {
    int done = 0;
    absl::Status status;
    TransferStats stats;
  };

  void Attach(KvReceiverOptions* options) {
    options->on_sealed = [this](const TransferId& id, uint64_t epoch, const TransferStats& stats) {
      absl::MutexLock lock(&mutex_);
      Receiver& entry = receiver_[Name(id, epoch)];
      ++entry.sealed;
      entry.stats = stats;
    };
    options->on_failed = [this](const TransferId& id, uint64_t epoch, const absl::Status& status) {
      absl::MutexLock lock(&mutex_);
      Receiver& entry = receiver_[Name(id, epoch)];
      ++entry.failed;
      entry.status = status;
    };
    options->on_quiet = [this](const TransferId& id, uint64_t epoch) {
      absl::MutexLock lock(&mutex_);
      ++receiver_[Name(id, epoch)].quiet;
    };
  }
  void Attach(KvSenderOptions* options) {
    options->on_done = [this](const TransferId& id, uint64_t epoch, const absl::Status& status,
                              const TransferStats& stats) {
      absl::MutexLock lock(&mutex_);
      Sender& entry = sender_[Name(id, epoch)];
      ++entry.done;
      entry.status = status;
      entry.stats = stats;
    };
  }

  Receiver Received(const TransferId& id, uint64_t epoch) const {
    absl::MutexLock lock(&mutex_);
    const auto it = receiver_.find(Name(id, epoch));
    return it == receiver_.end() ? Receiver{} : it->second;
  }
  Sender Sent(const TransferId& id, uint64_t epoch) const {
    absl::MutexLock lock(&mutex_);
    const auto it = sender_.find(Name(id, epoch));
    return it == sender_.end() ? Sender{} : it->second;
  }
  // Waits until on_quiet came; what is known of the transfer then.
  Receiver AwaitQuiet(const TransferId& id, uint64_t epoch) const {
    const std::string name = Name(id, epoch);
    absl::MutexLock lock(&mutex_);
    const auto quiet = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
      const auto it = receiver_.find(name);
      return it != receiver_.end() && it->second.quiet > 0;
    };
    EXPECT_TRUE(mutex_.AwaitWithTimeout(absl::Condition(&quiet), kPatience)) << "never quiet";
    const auto it = receiver_.find(name);
    return it == receiver_.end() ? Receiver{} : it->second;
  }
  Sender AwaitDone(const TransferId& id, uint64_t epoch) const {
    const std::string name = Name(id, epoch);
    absl::MutexLock lock(&mutex_);
    const auto done = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
      const auto it = sender_.find(name);
      return it != sender_.end() && it->second.done > 0;
    };
    EXPECT_TRUE(mutex_.AwaitWithTimeout(absl::Condition(&done), kPatience)) << "never done";
    const auto it = sender_.find(name);
    return it == sender_.end() ? Sender{} : it->second;
  }

 private:
  static std::string Name(const TransferId& id, uint64_t epoch) {
    return TransferKey{id, epoch}.ToString();
  }

  mutable absl::Mutex mutex_;
  std::map<std::string, Receiver> receiver_ ABSL_GUARDED_BY(mutex_);
  std::map<std::string, Sender> sender_ ABSL_GUARDED_BY(mutex_);
};

// A pool with the manners of a card's, on a CPU: only the store touches its memory, and it writes
// pools of other processes on a thread of its own.
class CardStore : public HostStore {
 public:
  // `card`: its name, and the only one whose memory it reaches.
  explicit CardStore(const KvRegion& region, std::string card = "card-0")
      : HostStore(region), card_(std::move(card)) {}
  KvMemoryKind kind() const override { return KvMemoryKind::kDevice; }
  std::byte* HostAddress(uint64_t /*offset*/) const override { return nullptr; }
  absl::StatusOr<ExportedPool> Export() const override {
    absl::StatusOr<ExportedPool> exported = HostStore::Export();
    if (exported.ok()) exported->card = card_;
    return exported;
  }
  absl::Status CanWrite(const std::string& card) const override {
    if (card == card_) return absl::OkStatus();
    return absl::FailedPreconditionError(card_ + " has no peer access to " + card);
  }
  absl::StatusOr<std::unique_ptr<PeerPool>> MapPeer(int fd, const KvPoolShape& peer,
                                                    std::span<std::byte> control) const override;

 private:
  class Peer;
  class ThreadCopy;
  const std::string card_;
};

class CardStore::ThreadCopy : public PeerPool::Copy {
 public:
  ThreadCopy(size_t blocks, std::function<bool(std::span<uint64_t>)> copy)
      : digests_(blocks, 0), thread_([this, copy] { whole_ = copy(digests_); }) {}
  bool Wait() override {
    thread_.join();
    return whole_;
  }
  std::span<const uint64_t> digests() const override { return digests_; }

 private:
  std::vector<uint64_t> digests_;
  bool whole_ = false;
  std::thread thread_;
};

class CardStore::Peer : public PeerPool {
 public:
  Peer(const CardStore* store, const KvPoolShape& shape, SharedMapping pool)
      : store_(store), shape_(shape), pool_(std::move(pool)) {}
  std::unique_ptr<Copy> Start(const BlockRun& run, const std::atomic<uint64_t>* grant,
                              uint64_t generation) override {
    // The caller's lists may be gone before the copy has ended.
    return std::make_unique<ThreadCopy>(
        run.source_blocks.size(),
        [this, run, grant, generation,
         from = std::vector<int32_t>(run.source_blocks.begin(), run.source_blocks.end()),
         to = std::vector<int32_t>(run.target_blocks.begin(), run.target_blocks.end())](
            std::span<uint64_t> digests) {
          BlockRun own = run;
          own.source_blocks = from;
          own.target_blocks = to;
          return store_->CopyRun(own, shape_, pool_.data(), CopyMode::kCached, digests,
                                 [&] { return grant->load() == generation; });
        });
  }
  absl::Status Probe(size_t /*bytes*/) override { return absl::OkStatus(); }

 private:
  const CardStore* const store_;
  const KvPoolShape shape_;
  const SharedMapping pool_;
};

inline absl::StatusOr<std::unique_ptr<PeerPool>> CardStore::MapPeer(
    int fd, const KvPoolShape& peer, std::span<std::byte> /*control*/) const {
  auto pool = SharedMapping::Map(fd, peer.TotalBytes());
  if (!pool.ok()) return pool.status();
  return std::make_unique<Peer>(this, peer, *std::move(pool));
}

// One receiver's and one sender's options over two pools; start them, or not. "staged" is tcp, and
// "cards_ring" shm_ring, between pools that only their stores can touch; such are those of
// "cuda_ipc" too.
struct Ends {
  explicit Ends(const std::string& name = "tcp", const KvLayout& layout = SmallLayout(),
                int source_blocks = 32, int target_blocks = 40)
      : transport(name == "staged"       ? "tcp"
                  : name == "cards_ring" ? "shm_ring"
                                         : name),
        source(layout, source_blocks),
        target(layout, target_blocks) {
    receiver_options.transports = transport;
    sender_options.transports = transport;
    source.FillRandom(7);
    receiver_options.region = target.region();
    receiver_options.worker_id = "decode-0";
    receiver_options.capability_digest = "cap";
    sender_options.region = source.region();
    sender_options.worker_id = "prefill-0";
    sender_options.capability_digest = "cap";
    sender_options.slow_link_bytes_per_second = 0;
    sender_options.link_test_time = absl::ZeroDuration();
    record.Attach(&receiver_options);
    record.Attach(&sender_options);
    if (name == "staged" || name == "cards_ring" || name == "cuda_ipc") UseCards();
  }
  // Pools of cards of these names.
  void UseCards(const std::string& sender = "card-0", const std::string& receiver = "card-0") {
    receiver_store = std::make_unique<CardStore>(receiver_options.region, receiver);
    sender_store = std::make_unique<CardStore>(sender_options.region, sender);
    receiver_options.store = receiver_store.get();
    sender_options.store = sender_store.get();
  }

  void Start() {
    StartReceiver();
    StartSender();
  }
  void StartReceiver() {
    auto started = KvReceiver::Start(receiver_options);
    ASSERT_TRUE(started.ok()) << started.status();
    receiver = *std::move(started);
  }
  void StartSender() {
    auto started = KvSender::Start(sender_options);
    ASSERT_TRUE(started.ok()) << started.status();
    sender = *std::move(started);
  }

  // Expects `blocks`, of any sender unless one is named, and makes the target that a worker would
  // be handed.
  KvSendTarget Expect(const TransferId& id, uint64_t epoch, const std::vector<int32_t>& blocks,
                      const std::string& from = "") {
    auto token = receiver->Expect(id, epoch, blocks, from);
    EXPECT_TRUE(token.ok()) << token.status();
    return KvSendTarget{
        id,         epoch, receiver_options.transports, receiver->address(), token.value_or(""),
        "decode-0", blocks};
  }
  // Pushes all layers of source_blocks[i] -> ordinal i.
  void PushAll(const TransferId& id, uint64_t epoch, const std::vector<int32_t>& source_blocks) {
    std::vector<int32_t> ordinals(source_blocks.size());
    for (size_t i = 0; i < ordinals.size(); ++i) ordinals[i] = static_cast<int32_t>(i);
    for (int layer = 0; layer < source.region().layout.num_layers; ++layer) {
      sender->Push(id, epoch, layer, source_blocks, ordinals);
    }
  }
  // Ships block 1 to block 9 as a transfer of its own.
  TransferId ShipOne() {
    const TransferId id = TransferId::Random();
    const absl::Status opened = sender->Open(Expect(id, 1, {9}));
    EXPECT_TRUE(opened.ok()) << opened;
    PushAll(id, 1, {1});
    sender->Finish(id, 1);
    return id;
  }
  void ExpectEqualBlocks(const std::vector<int32_t>& source_blocks,
                         const std::vector<int32_t>& target_blocks) const {
    for (size_t i = 0; i < source_blocks.size(); ++i) {
      // Not EXPECT_EQ: nobody wants to read the bytes.
      EXPECT_TRUE(source.BlockBytes(source_blocks[i]) == target.BlockBytes(target_blocks[i]))
          << "ordinal " << i;
    }
  }

  const std::string transport;
  TestPool source;
  TestPool target;
  std::unique_ptr<KvStore> receiver_store;  // if UseCards
  std::unique_ptr<KvStore> sender_store;
  Record record;
  KvReceiverOptions receiver_options;
  KvSenderOptions sender_options;
  std::unique_ptr<KvReceiver> receiver;
  std::unique_ptr<KvSender> sender;  // destroyed first
};

// A random choice of `count` different blocks.
inline std::vector<int32_t> RandomBlocks(std::mt19937_64* random, int num_blocks, size_t count) {
  std::vector<int32_t> all(static_cast<size_t>(num_blocks));
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int32_t>(i);
  std::shuffle(all.begin(), all.end(), *random);
  all.resize(count);
  return all;
}

}  // namespace tandem::kvtransfer
