// KV connections over TLS: what is shipped arrives, whoever shows no certificate of the CA is not
// heard, and certificates that change disturb nobody.
#include <netinet/in.h>
#include <random>
#include <sys/socket.h>
#include <thread>
#include <unistd.h>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "common/base/host_port.h"
#include "kvtransfer/transport/kv_connection.h"
#include "openssl/ssl.h"
#include "tests/support/certificates.h"
#include "tests/support/paths.h"
#include "tests/unit/kvtransfer/endpoint_fixture.h"

namespace tandem::kvtransfer {
namespace {

using testing::HasSubstr;

TlsTexts TextsOf(const TestCertificate& own, const std::string& ca, int64_t generation = 1) {
  return {own.certificate, own.key, ca, generation};
}

// Texts that a test changes while connections are made.
class Texts {
 public:
  explicit Texts(TlsTexts texts) : texts_(std::move(texts)) {}
  void Set(const TestCertificate& own, const std::string& ca) {
    absl::MutexLock lock(&mutex_);
    texts_ = TextsOf(own, ca, texts_.generation + 1);
  }
  std::function<TlsTexts()> Get() {
    return [this] {
      absl::MutexLock lock(&mutex_);
      return texts_;
    };
  }

 private:
  absl::Mutex mutex_;
  TlsTexts texts_ ABSL_GUARDED_BY(mutex_);
};

class KvTlsTest : public testing::TestWithParam<const char*> {
 protected:
  std::function<TlsTexts()> Good() const {
    return [texts = TextsOf(ca_.Issue(), ca_.certificate())] { return texts; };
  }
  // What a sender is told that has `sender` to show, by a receiver that has `receiver`.
  static absl::Status Ship(const std::function<TlsTexts()>& receiver,
                           const std::function<TlsTexts()>& sender) {
    Ends ends;
    ends.receiver_options.tls = receiver;
    ends.sender_options.tls = sender;
    ends.receiver_options.auth_timeout = absl::Milliseconds(500);
    ends.sender_options.connect_timeout = absl::Milliseconds(500);
    ends.Start();
    const TransferId id = ends.ShipOne();
    absl::Status status = ends.record.AwaitDone(id, 1).status;
    if (status.ok()) {
      ends.ExpectEqualBlocks({1}, {9});
    } else {
      EXPECT_EQ(ends.target.BlockBytes(9), std::string(ends.target.BlockBytes(9).size(), '\xee'));
    }
    return status;
  }

  const TestCa ca_{"cluster"};
  const TestCa other_ca_{"another"};
};

TEST_P(KvTlsTest, ShipsBlocks) {
  const KvLayout layout{4, 8, 64, 16, DType::kBFloat16};
  Ends ends(GetParam(), layout, 200, 200);
  ends.receiver_options.tls = Good();
  ends.sender_options.tls = Good();
  ends.Start();
  std::mt19937_64 random(1);
  for (int round = 0; round < 3; ++round) {
    const std::vector<int32_t> from = RandomBlocks(&random, 200, 180);
    const std::vector<int32_t> to = RandomBlocks(&random, 200, 180);
    const TransferId id = TransferId::Random();
    ASSERT_OK(ends.sender->Open(ends.Expect(id, 1, to)));
    ends.PushAll(id, 1, from);
    ends.sender->Finish(id, 1);
    EXPECT_OK(ends.record.AwaitDone(id, 1).status);
    EXPECT_EQ(ends.record.AwaitQuiet(id, 1).sealed, 1);
    ends.ExpectEqualBlocks(from, to);
  }
}
INSTANTIATE_TEST_SUITE_P(Transports, KvTlsTest, testing::Values("tcp", "staged", "shm"));

// Frames of all sizes in both directions at once.
TEST_F(KvTlsTest, FramesArriveWholeAndInOrder) {
  const auto network = MakeTlsNetwork(Good());
  const auto listener = network->Listen("127.0.0.1", 0);
  ASSERT_OK(listener);
  auto dialled = network->Dial((*listener)->address(), kPatience);
  ASSERT_OK(dialled);
  auto accepted = (*listener)->Accept(kPatience);
  ASSERT_OK(accepted);
  constexpr int kFrames = 300;
  const auto payload_of = [](uint64_t seed, int i) {
    std::mt19937_64 random(seed * 1000 + static_cast<uint64_t>(i));
    std::string bytes(random() % (i % 10 == 0 ? 1000000 : 3000), '\0');
    for (char& c : bytes) c = static_cast<char>(random());
    return bytes;
  };
  const auto send = [&](KvConnection* connection, uint64_t seed) {
    for (int i = 0; i < kFrames; ++i) {
      const std::string payload = payload_of(seed, i);
      FrameHeader header;
      header.type = FrameType::kData;
      header.epoch = static_cast<uint64_t>(i);
      header.ordinal_count = header.layer_count = header.head_count = 1;
      header.payload_bytes = static_cast<uint32_t>(payload.size());
      const ConstBytes bytes = std::as_bytes(std::span(payload));
      // In two parts, as a run of pages is.
      const std::array<ConstBytes, 2> parts = {bytes.first(bytes.size() / 3),
                                               bytes.subspan(bytes.size() / 3)};
      ASSERT_OK(connection->Send(header, parts, kPatience));
    }
  };
  const auto receive = [&](KvConnection* connection, uint64_t seed) {
    for (int i = 0; i < kFrames; ++i) {
      const auto header = connection->ReceiveHeader(kPatience);
      ASSERT_OK(header);
      ASSERT_EQ(header->epoch, static_cast<uint64_t>(i));
      std::string payload(header->payload_bytes, '\0');
      ASSERT_OK(ReceiveAll(connection, std::as_writable_bytes(std::span(payload)), kPatience));
      ASSERT_TRUE(payload == payload_of(seed, i)) << i;
    }
  };
  std::vector<std::thread> threads;
  threads.emplace_back(send, dialled->get(), 1);
  threads.emplace_back(receive, accepted->get(), 1);
  threads.emplace_back(send, accepted->get(), 2);
  threads.emplace_back(receive, dialled->get(), 2);
  for (std::thread& thread : threads) thread.join();
}

TEST_F(KvTlsTest, ACertificateOfAnotherCaIsRefusedAtBothEnds) {
  const TlsTexts texts = TextsOf(other_ca_.Issue(), ca_.certificate());
  const auto other = [texts] { return texts; };
  EXPECT_OK(Ship(Good(), Good()));
  EXPECT_FALSE(Ship(Good(), other).ok());
  const absl::Status receiver = Ship(other, Good());
  EXPECT_THAT(std::string(receiver.message()), HasSubstr("--cluster-ca"));
}

TEST_F(KvTlsTest, AnExpiredCertificateIsRefusedAtBothEnds) {
  const TlsTexts texts = TextsOf(ca_.Issue(-absl::Minutes(1)), ca_.certificate());
  const auto expired = [texts] { return texts; };
  EXPECT_FALSE(Ship(Good(), expired).ok());
  const absl::Status receiver = Ship(expired, Good());
  EXPECT_THAT(std::string(receiver.message()), HasSubstr("certificate has expired"));
}

TEST_F(KvTlsTest, WhoSpeaksNoTlsIsNotHeard) {
  EXPECT_FALSE(Ship(Good(), nullptr).ok());
  EXPECT_FALSE(Ship(nullptr, Good()).ok());
}

// TLS without a certificate: the connection ends before the receiver has said anything.
TEST_F(KvTlsTest, WhoShowsNoCertificateIsNotAnswered) {
  Ends ends;
  ends.receiver_options.tls = Good();
  ends.StartReceiver();
  const auto address = ParseHostPort(ends.receiver->address());
  ASSERT_OK(address);
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in to = {};
  to.sin_family = AF_INET;
  to.sin_port = htons(static_cast<uint16_t>(address->port));
  to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  ASSERT_EQ(connect(fd, reinterpret_cast<sockaddr*>(&to), sizeof(to)), 0);
  SSL_CTX* const context = SSL_CTX_new(TLS_client_method());
  SSL* const ssl = SSL_new(context);
  SSL_set_fd(ssl, fd);
  char byte = 0;
  if (SSL_connect(ssl) == 1) {
    EXPECT_LE(SSL_read(ssl, &byte, 1), 0);
  }
  SSL_free(ssl);
  SSL_CTX_free(context);
  close(fd);
}

// To another CA, by way of believing both: a connection that is there goes on, new ones are judged
// by what is in force.
TEST_F(KvTlsTest, CertificatesAndCaChange) {
  const TestCa next("next");
  Texts receiver(TextsOf(ca_.Issue(), ca_.certificate()));
  Texts sender(TextsOf(ca_.Issue(), ca_.certificate()));
  Ends ends;
  ends.receiver_options.tls = receiver.Get();
  ends.sender_options.tls = sender.Get();
  ends.Start();
  const auto ship = [&ends] {
    const TransferId id = ends.ShipOne();
    const absl::Status status = ends.record.AwaitDone(id, 1).status;
    ends.receiver->Cancel(id, 1);
    return status;
  };
  EXPECT_OK(ship());
  const std::string both = ca_.certificate() + next.certificate();
  receiver.Set(ca_.Issue(), both);
  sender.Set(ca_.Issue(), both);
  receiver.Set(next.Issue(), both);
  sender.Set(next.Issue(), next.certificate());
  EXPECT_OK(ship());
  ends.sender.reset();
  ends.StartSender();
  EXPECT_OK(ship());
  receiver.Set(next.Issue(), next.certificate());
  EXPECT_OK(ship());
  sender.Set(ca_.Issue(), both);
  ends.sender.reset();
  ends.StartSender();
  EXPECT_FALSE(ship().ok());
}

}  // namespace
}  // namespace tandem::kvtransfer
