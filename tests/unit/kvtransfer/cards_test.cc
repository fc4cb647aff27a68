// The cuda_ipc transport without a card: which transport two pools agree on, what is refused with
// which words, and that a revoked copy is none. On real cards: tests/gpu/cuda_ipc_test.cc.
#include <thread>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "kvtransfer/store/kv_store.h"
#include "kvtransfer/transport/kv_transport.h"
#include "kvtransfer/transport/shared_pool.h"
#include "kvtransfer/transport/unix_rendezvous.h"
#include "tests/support/paths.h"
#include "tests/unit/kvtransfer/endpoint_fixture.h"

namespace tandem::kvtransfer {
namespace {

using ::testing::HasSubstr;

std::string TransportOf(Ends* ends) {
  ends->Start();
  const TransferId id = ends->ShipOne();
  const Record::Receiver got = ends->record.AwaitQuiet(id, 1);
  EXPECT_EQ(got.sealed, 1) << got.status;
  return got.stats.transport;
}

TEST(Cards, ThatReachEachOtherUseCudaIpcByDefault) {
  Ends ends("auto");
  ends.UseCards();
  EXPECT_EQ(TransportOf(&ends), "cuda_ipc");
  EXPECT_EQ(ends.sender->Counters().transport_fallbacks, 0);
}

TEST(Cards, ThatDoNotReachEachOtherFallBackToTheRingAndSaySo) {
  Ends ends("auto");
  ends.UseCards("card-0", "card-1");
  EXPECT_EQ(TransportOf(&ends), "shm_ring");
  EXPECT_EQ(ends.sender->Counters().transport_fallbacks, 1);
}

TEST(Cards, ThatDoNotReachEachOtherAreRefusedIfItIsForced) {
  Ends ends("cuda_ipc");
  ends.UseCards("card-0", "card-1");
  ends.Start();
  const TransferId id = ends.ShipOne();
  EXPECT_THAT(ends.record.AwaitDone(id, 1).status.ToString(),
              HasSubstr("card-0 has no peer access to card-1"));
}

TEST(Cards, OneFlagTurnsItOff) {
  Ends ends("tcp");
  ends.UseCards();
  EXPECT_EQ(TransportOf(&ends), "tcp");
  EXPECT_EQ(ends.sender->Counters().transport_fallbacks, 0);
}

TEST(Cards, APoolOfTheHostAndOneOfACardMeetInTheRing) {
  Ends ends("auto");
  ends.UseCards();
  ends.sender_options.store = nullptr;
  EXPECT_EQ(TransportOf(&ends), "shm_ring");
}

TEST(Cards, ForcedWhereThereIsNoneTheEndDoesNotStart) {
  Ends ends("auto");
  ends.receiver_options.transports = ends.sender_options.transports = "cuda_ipc";
  EXPECT_THAT(KvReceiver::Start(ends.receiver_options).status().ToString(),
              HasSubstr("cuda_ipc needs a KV pool in a card's memory (--device=cuda)"));
  EXPECT_THAT(KvSender::Start(ends.sender_options).status().ToString(),
              HasSubstr("cuda_ipc needs a KV pool in a card's memory (--device=cuda)"));
}

TEST(Cards, ACardThatCannotShareItsMemoryShipsThroughTheRing) {
  Ends ends("auto");
  ends.receiver_options.region.fd = -1;
  ends.UseCards();
  EXPECT_EQ(TransportOf(&ends), "shm_ring");
}

TEST(Cards, ThatAreToldShmUseTheRing) {
  Ends ends("shm");
  ends.UseCards();
  EXPECT_EQ(TransportOf(&ends), "shm_ring");
  EXPECT_EQ(ends.sender->Counters().transport_fallbacks, 0);
}

TEST(Cards, OfOneHostUseNcclWhereItIsForced) {
  Ends ends("nccl");
  EXPECT_EQ(TransportOf(&ends), "nccl");
}

// The reader has the header and waits for bytes that never come. The threads that do so may be none
// on which an end learns of its peer, or both would wait for the io timeout.
TEST(Cards, AWriterThatGoesAfterTheHeaderOfASmallFrameHoldsNobody) {
  Ends ends("nccl");
  ends.sender_options.io_timeout = ends.receiver_options.io_timeout = 2 * kPatience;
  ends.Start();
  ends.record.AwaitQuiet(ends.ShipOne(), 1);
  const FakeFifo::Loss loss;
  const TransferId id = ends.ShipOne();
  while (!FakeFifo::Loss::Felt()) std::this_thread::yield();
  std::thread going([&] { ends.sender = nullptr; });
  EXPECT_FALSE(ends.record.AwaitDone(id, 1).status.ok());
  const Record::Receiver got = ends.record.AwaitQuiet(id, 1);
  EXPECT_EQ(got.sealed, 0);
  EXPECT_EQ(got.failed, 1);
  going.join();
}

TEST(Cards, ThatAreOneHaveNoNcclBetweenThem) {
  Ends ends("nccl");
  ends.UseCards("card-0", "card-0");
  ends.Start();
  const TransferId id = ends.ShipOne();
  EXPECT_THAT(ends.record.AwaitDone(id, 1).status.ToString(),
              HasSubstr("both KV pools lie on one card"));
}

// It encrypts nothing and proves nothing: who wants it says so.
TEST(Cards, NcclIsNotUsedUnlessItIsNamed) {
  const std::vector<KvTransport*> automatic = *ParseTransports("auto");
  EXPECT_THAT(automatic, ::testing::Not(::testing::Contains(NcclTransport())));
  EXPECT_EQ(automatic.size() + 1, KnownTransports().size());
  EXPECT_THAT(*ParseTransports("cuda_ipc,nccl"), ::testing::Contains(NcclTransport()));
}

TEST(Cards, NcclIsRefusedWhereConnectionsAreEncrypted) {
  TestPool pool(SmallLayout(), 2);
  const CardStore store(pool.region());
  EXPECT_OK(NcclTransport()->Register(&store, {}).status());
  EXPECT_THAT(NcclTransport()->Register(&store, {.encrypted = true}).status().ToString(),
              HasSubstr("nccl encrypts nothing"));
}

TEST(Cards, NcclIsRefusedToAPoolOfTheHost) {
  Ends ends("auto");
  ends.receiver_options.transports = "nccl";
  EXPECT_THAT(KvReceiver::Start(ends.receiver_options).status().ToString(),
              HasSubstr("nccl needs a KV pool in a card's memory (--device=cuda)"));
}

TEST(SharedPoolAdvert, SaysHostSocketAndCard) {
  TestPool pool(SmallLayout(), 2);
  const CardStore store(pool.region(), "GPU-1");
  const auto offer = *OfferSharedPool(store);
  EXPECT_LE(offer->advert().size(), kMaxAdvertBytes);
  const auto advert = ReadSharedPoolAdvert(offer->advert());
  ASSERT_OK(advert.status());
  EXPECT_EQ(advert->card, "GPU-1");
  EXPECT_THAT(ReadSharedPoolAdvert("another-boot tandem-kv-x GPU-1").status().ToString(),
              HasSubstr("the peer is on another host"));
  EXPECT_EQ(ReadSharedPoolAdvert("").status().code(), absl::StatusCode::kInvalidArgument);
}

// A process that dies with copies on a card may leave them behind for a moment.
TEST(SharedPool, CopiesOnACardAreCounted) {
  const auto control = *ShmControl::Create();
  const auto mapping = *SharedMapping::Map(control->fd(), kShmControlBytes);
  auto* page = reinterpret_cast<ShmControlPage*>(mapping.data());
  EXPECT_FALSE(control->copies_under_way());
  page->copies_under_way.fetch_add(1);
  EXPECT_TRUE(control->copies_under_way());
}

}  // namespace
}  // namespace tandem::kvtransfer
