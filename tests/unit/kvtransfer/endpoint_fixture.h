// Pools, and recorders of what endpoints call back, for tests of the two ends together.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <deque>
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
  absl::StatusOr<std::string> FifoPlace() const override { return card_; }
  absl::StatusOr<std::string> NewFifoId() const override { return TransferId::Random().ToBytes(); }
  absl::StatusOr<std::unique_ptr<PeerFifo>> JoinFifo(const std::string& id, FifoEnd end,
                                                     size_t max_copy_bytes,
                                                     absl::Duration patience) const override;

 private:
  class Peer;
  class ThreadCopy;
  class Fifo;
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

// The ends of FIFOs in this process, which meet by their id. As with NCCL, what is sent is on its
// way until the other end takes it, and an end that breaks it off tells only itself.
class FakeFifo {
 public:
  // While it lives nothing that is sent arrives, as if each sender had gone when it had begun.
  class Loss {
   public:
    Loss() {
      felt_ = false;
      on_ = true;
    }
    ~Loss() { on_ = false; }
    // Whether anything has been sent in one's lifetime.
    static bool Felt() { return felt_; }

   private:
    friend FakeFifo;
    inline static std::atomic<bool> on_ = false;
    inline static std::atomic<bool> felt_ = false;
  };

  static std::shared_ptr<FakeFifo> Meet(const std::string& id) {
    static auto* mutex = new absl::Mutex;
    static auto* fifos = new std::map<std::string, std::weak_ptr<FakeFifo>>;
    absl::MutexLock lock(mutex);
    std::shared_ptr<FakeFifo> fifo = (*fifos)[id].lock();
    if (fifo == nullptr) (*fifos)[id] = fifo = std::make_shared<FakeFifo>();
    absl::MutexLock fifo_lock(&fifo->mutex_);
    ++fifo->ends_;
    return fifo;
  }
  absl::Status AwaitBoth(FifoEnd end, absl::Duration patience) {
    return Await(
        end, [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return ends_ == 2; }, patience);
  }
  uint64_t Send(std::vector<std::byte> bytes) {
    absl::MutexLock lock(&mutex_);
    if (Loss::on_) {
      Loss::felt_ = true;
    } else {
      frames_.push_back(std::move(bytes));
    }
    return ++sent_;
  }
  absl::Status AwaitTaken(uint64_t number, absl::Duration patience) {
    return Await(
        FifoEnd::kWriter, [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return taken_ >= number; },
        patience);
  }
  // Which of all frames the next Take() of this number will be.
  uint64_t Reserve() {
    absl::MutexLock lock(&mutex_);
    return ++reserved_;
  }
  absl::StatusOr<std::vector<std::byte>> Take(uint64_t number, absl::Duration patience) {
    const absl::Status there = Await(
        FifoEnd::kReader,
        [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
          return !frames_.empty() && taken_ + 1 == number;
        },
        patience);
    if (!there.ok()) return there;
    absl::MutexLock lock(&mutex_);
    std::vector<std::byte> bytes = std::move(frames_.front());
    frames_.pop_front();
    ++taken_;
    return bytes;
  }
  void Break(FifoEnd end) {
    absl::MutexLock lock(&mutex_);
    broken(end) = true;
  }

 private:
  template <typename Done>
  absl::Status Await(FifoEnd end, Done done, absl::Duration patience) {
    absl::MutexLock lock(&mutex_);
    const auto over = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return broken(end) || done(); };
    const bool came = mutex_.AwaitWithTimeout(absl::Condition(&over), patience);
    if (came && !broken(end)) return absl::OkStatus();
    broken(end) = true;
    return absl::UnavailableError("the link has ended");
  }
  bool& broken(FifoEnd end) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return broken_[static_cast<size_t>(end)];
  }

  absl::Mutex mutex_;
  std::deque<std::vector<std::byte>> frames_ ABSL_GUARDED_BY(mutex_);
  uint64_t sent_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t reserved_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t taken_ ABSL_GUARDED_BY(mutex_) = 0;
  int ends_ ABSL_GUARDED_BY(mutex_) = 0;
  std::array<bool, 2> broken_ ABSL_GUARDED_BY(mutex_) = {};  // by end
};

class CardStore::Fifo : public PeerFifo {
 public:
  Fifo(const CardStore* store, FifoEnd end, absl::Duration patience, std::shared_ptr<FakeFifo> fifo)
      : store_(store), end_(end), patience_(patience), fifo_(std::move(fifo)) {}
  ~Fifo() override { Abort(); }

  absl::Status AwaitPeer() override { return fifo_->AwaitBoth(end_, patience_); }
  std::unique_ptr<Gathering> Gather(const BlockRun& run) override {
    std::vector<std::byte> bytes(run.Bytes(store_->shape().layout));
    std::vector<uint64_t> digests(run.source_blocks.size(), 0);
    store_->GatherRun(run, bytes.data(), digests);
    return std::make_unique<Sent>(this, fifo_->Send(std::move(bytes)), std::move(digests));
  }
  std::unique_ptr<Fetched> Fetch(size_t bytes) override {
    return std::make_unique<Coming>(this, fifo_->Reserve(), bytes);
  }
  absl::Status ProbeOut(size_t bytes, std::span<const std::byte> pattern) override {
    std::vector<std::byte> sent(pattern.begin(), pattern.end());
    sent.resize(bytes);
    fifo_->Send(std::move(sent));
    return absl::OkStatus();
  }
  absl::StatusOr<std::vector<std::byte>> ProbeIn(size_t bytes, bool wanted) override {
    auto came = fifo_->Take(fifo_->Reserve(), patience_);
    if (came.ok()) {
      EXPECT_EQ(came->size(), bytes);
      if (!wanted) came->clear();
    }
    return came;
  }
  void Abort() override { fifo_->Break(end_); }

 private:
  class Sent : public Gathering {
   public:
    Sent(Fifo* fifo, uint64_t number, std::vector<uint64_t> digests)
        : fifo_(fifo), number_(number), digests_(std::move(digests)) {}
    absl::Status Wait() override { return fifo_->fifo_->AwaitTaken(number_, fifo_->patience_); }
    std::span<const uint64_t> digests() const override { return digests_; }

   private:
    Fifo* const fifo_;
    const uint64_t number_;
    const std::vector<uint64_t> digests_;
  };
  class Coming : public Fetched {
   public:
    Coming(Fifo* fifo, uint64_t number, size_t bytes)
        : fifo_(fifo), number_(number), bytes_(bytes) {}
    absl::Status Wait() override {
      auto came = fifo_->fifo_->Take(number_, fifo_->patience_);
      if (!came.ok()) return came.status();
      EXPECT_EQ(came->size(), bytes_) << "both ends must say how much it is";
      came_ = *std::move(came);
      return absl::OkStatus();
    }
    void Scatter(std::span<const CopyPiece> pieces) override {
      fifo_->store_->Scatter(came_.data(), pieces);
    }

   private:
    Fifo* const fifo_;
    const uint64_t number_;
    const size_t bytes_;
    std::vector<std::byte> came_;
  };

  const CardStore* const store_;
  const FifoEnd end_;
  const absl::Duration patience_;
  const std::shared_ptr<FakeFifo> fifo_;
};

inline absl::StatusOr<std::unique_ptr<PeerFifo>> CardStore::JoinFifo(
    const std::string& id, FifoEnd end, size_t /*max_copy_bytes*/, absl::Duration patience) const {
  return std::make_unique<Fifo>(this, end, patience, FakeFifo::Meet(id));
}

// One receiver's and one sender's options over two pools; start them, or not. "staged" is tcp, and
// "cards_ring" shm_ring, between pools that only their stores can touch; such are those of
// "cuda_ipc" and "nccl" too.
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
    if (name == "nccl") UseCards("card-0", "card-1");
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
