// A transport whose posts end later, in any order, as those of a GPU do: the sender must neither
// finish nor go quiet before they have, and must hold what they read.
#include <deque>
#include <functional>
#include <memory>

#include "gtest/gtest.h"

#include "kvtransfer/channel/sender_link.h"
#include "kvtransfer/channel/sender_peer.h"
#include "tests/support/paths.h"
#include "tests/unit/kvtransfer/endpoint_fixture.h"

namespace tandem::kvtransfer {
namespace {

// What the test decides of the posts that are under way.
class PostDesk {
 public:
  struct Entry {
    std::unique_ptr<KvPost> inner;  // null: not done yet
    std::function<absl::StatusOr<std::unique_ptr<KvPost>>()> send;
  };

  size_t Begin(KvConnection* connection,
               std::function<absl::StatusOr<std::unique_ptr<KvPost>>()> send) {
    absl::MutexLock lock(&mutex_);
    connection_ = connection;
    entries_.push_back({nullptr, std::move(send)});
    return entries_.size() - 1;
  }
  void AwaitPosts(size_t count) {
    absl::MutexLock lock(&mutex_);
    const auto begun = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
      return entries_.size() >= count;
    };
    EXPECT_TRUE(mutex_.AwaitWithTimeout(absl::Condition(&begun), kPatience));
  }
  // The post has happened.
  void Complete(size_t index) {
    absl::MutexLock lock(&mutex_);
    auto post = entries_[index].send();
    EXPECT_OK(post);
    entries_[index].inner = *std::move(post);
    connection_->Interrupt();
  }
  const KvPost* Inner(size_t index) {
    absl::MutexLock lock(&mutex_);
    return entries_[index].inner.get();
  }

 private:
  absl::Mutex mutex_;
  std::deque<Entry> entries_ ABSL_GUARDED_BY(mutex_);
  KvConnection* connection_ ABSL_GUARDED_BY(mutex_) = nullptr;
};

class LatePost : public KvPost {
 public:
  LatePost(PostDesk* desk, size_t index) : desk_(desk), index_(index) {}
  bool Done() override { return desk_->Inner(index_) != nullptr; }
  const absl::Status& status() const override { return desk_->Inner(index_)->status(); }
  std::span<const uint64_t> digests() const override { return desk_->Inner(index_)->digests(); }

 private:
  PostDesk* const desk_;
  const size_t index_;
};

// tcp's writer, but the work of a post is done when the test says so.
class LateWriter : public KvWriter {
 public:
  LateWriter(std::unique_ptr<KvWriter> inner, KvConnection* connection, PostDesk* desk)
      : inner_(std::move(inner)), connection_(connection), desk_(desk) {}
  absl::StatusOr<std::unique_ptr<KvPost>> Post(const FrameHeader& header, const BlockRun& run,
                                               const std::string& grant) override {
    std::vector<int32_t> from(run.source_blocks.begin(), run.source_blocks.end());
    std::vector<int32_t> to(run.target_blocks.begin(), run.target_blocks.end());
    const size_t index =
        desk_->Begin(connection_, [=, this, from = std::move(from), to = std::move(to)] {
          BlockRun kept = run;
          kept.source_blocks = from;
          kept.target_blocks = to;
          return inner_->Post(header, kept, grant);
        });
    return std::make_unique<LatePost>(desk_, index);
  }
  absl::Status Probe(FrameHeader header, ConstBytes pattern) override {
    return inner_->Probe(header, pattern);
  }
  ProbeRoom probe_room() const override { return inner_->probe_room(); }

 private:
  const std::unique_ptr<KvWriter> inner_;
  KvConnection* const connection_;
  PostDesk* const desk_;
};

class LateRegistration : public KvRegistration {
 public:
  LateRegistration(std::unique_ptr<KvRegistration> inner, PostDesk* desk)
      : inner_(std::move(inner)), desk_(desk) {}
  absl::StatusOr<std::unique_ptr<KvOffer>> Offer() override { return inner_->Offer(); }
  absl::StatusOr<std::unique_ptr<KvWriter>> Connect(KvConnection* connection,
                                                    const std::string& advert,
                                                    const KvPoolShape& peer,
                                                    SelectPeer select) override {
    auto writer = inner_->Connect(connection, advert, peer, select);
    if (!writer.ok()) return writer.status();
    return std::make_unique<LateWriter>(*std::move(writer), connection, desk_);
  }

 private:
  const std::unique_ptr<KvRegistration> inner_;
  PostDesk* const desk_;
};

class LatePosts : public ::testing::Test {
 protected:
  LatePosts() : store_(*MakeKvStore(ends_.source.region())) {
    ends_.StartReceiver();
    transports_.push_back(
        {TcpTransport(),
         std::make_unique<LateRegistration>(*TcpTransport()->Register(store_.get(), {}), &desk_)});
    context_ = {
        {&ends_.sender_options, store_.get(), &transports_, TcpNetwork(), &counters_},
        [this](const TransferKey& key, const absl::Status& status, const TransferStats& stats) {
          ends_.sender_options.on_done(key.id, key.epoch, status, stats);
        }};
    peer_ = std::make_unique<SenderPeer>(PeerAddress{ends_.receiver->address(), "decode-0", "tcp"},
                                         &context_);
  }
  ~LatePosts() override { peer_.reset(); }

  void PushLayer(int layer) { peer_->Push(key_, layer, from_, ordinals_, nullptr); }

  Ends ends_;
  const std::unique_ptr<KvStore> store_;
  PostDesk desk_;
  std::vector<RegisteredTransport> transports_;
  KvCounterBlock counters_;
  SenderContext context_;
  std::unique_ptr<SenderPeer> peer_;
  const TransferKey key_ = {TransferId::Random(), 1};
  const std::vector<int32_t> from_ = {4, 7};
  const std::vector<int32_t> to_ = {9, 3};
  const std::vector<int32_t> ordinals_ = {0, 1};
};

TEST_F(LatePosts, FinishWaitsForThemInWhateverOrderTheyEnd) {
  peer_->Open(ends_.Expect(key_.id, 1, to_));
  for (int layer = 0; layer < 3; ++layer) {
    PushLayer(layer);
    desk_.AwaitPosts(static_cast<size_t>(layer) + 1);
  }
  peer_->Finish(key_);
  desk_.Complete(2);
  desk_.Complete(0);
  EXPECT_EQ(ends_.record.Received(key_.id, 1).sealed, 0);
  desk_.Complete(1);
  EXPECT_EQ(ends_.record.AwaitQuiet(key_.id, 1).sealed, 1);
  EXPECT_OK(ends_.record.AwaitDone(key_.id, 1).status);
  ends_.ExpectEqualBlocks(from_, to_);
}

TEST_F(LatePosts, AnAbortedTransferIsQuietOnlyWhenItsPostsHaveEnded) {
  peer_->Open(ends_.Expect(key_.id, 1, to_));
  PushLayer(0);
  desk_.AwaitPosts(1);
  peer_->Abort(key_);
  // The next transfer's post is handled after the abort.
  const TransferKey next = {TransferId::Random(), 1};
  peer_->Open(ends_.Expect(next.id, 1, {20}));
  peer_->Push(next, 0, std::vector<int32_t>{1}, std::vector<int32_t>{0}, nullptr);
  desk_.AwaitPosts(2);
  EXPECT_EQ(ends_.record.Sent(key_.id, 1).done, 0) << "its source blocks are still being read";
  EXPECT_EQ(ends_.record.Received(key_.id, 1).quiet, 0);
  desk_.Complete(0);
  EXPECT_EQ(ends_.record.AwaitDone(key_.id, 1).status.code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(ends_.record.AwaitQuiet(key_.id, 1).failed, 1);
}

}  // namespace
}  // namespace tandem::kvtransfer
