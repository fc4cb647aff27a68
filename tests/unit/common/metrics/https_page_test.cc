// /metrics over HTTPS: to whom it is shown, and that nobody keeps others from it.
#include "common/metrics/https_page.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <string>
#include <sys/socket.h>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "common/metrics/metrics.h"
#include "tests/support/certificates.h"
#include "tests/support/paths.h"

namespace tandem {
namespace {

using testing::AllOf;
using testing::EndsWith;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::StartsWith;

class HttpsPageTest : public testing::Test {
 protected:
  HttpsPageTest() {
    auto page = HttpsPage::Serve(
        {"127.0.0.1", 0}, "/metrics", "text/plain; version=0.0.4",
        [] { return std::string(300000, 'm'); }, With(ca_.Issue()));
    EXPECT_OK(page);
    page_ = *std::move(page);
  }
  std::function<TlsTexts()> With(const TestCertificate& own) const {
    const TlsTexts texts = {own.certificate, own.key, ca_.certificate(), 1};
    return [texts] { return texts; };
  }
  Fd Connect() const {
    Fd fd(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_in to = {};
    to.sin_family = AF_INET;
    to.sin_port = htons(static_cast<uint16_t>(page_->port()));
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    EXPECT_EQ(connect(fd.get(), reinterpret_cast<sockaddr*>(&to), sizeof(to)), 0);
    return fd;
  }
  // All that comes after `request`; empty if nothing does.
  std::string Ask(const std::string& request, const TestCertificate& own) const {
    const Fd fd = Connect();
    TlsContexts contexts(With(own));
    const auto context = contexts.Now();
    EXPECT_OK(context);
    const auto stream = TlsStream::Make(fd.get(), "page", *context, TlsStream::End::kDials);
    EXPECT_OK(stream);
    if (!(*stream)->Handshake(absl::Seconds(30)).ok()) return "";
    size_t sent = 0;
    std::string answer;
    const absl::Time end = absl::Now() + absl::Seconds(30);
    while (absl::Now() < end) {
      const iovec from = {const_cast<char*>(request.data()) + sent, request.size() - sent};
      if (const auto n = (*stream)->Send({&from, 1}); n.ok()) sent += *n;
      std::string piece(5000, '\0');
      const iovec into = {piece.data(), piece.size()};
      const auto n = (*stream)->Receive({&into, 1});
      if (!n.ok()) break;
      answer.append(piece, 0, *n);
      if (*n == 0) absl::SleepFor(absl::Milliseconds(1));
    }
    return answer;
  }

  const TestCa ca_{"cluster"};
  std::unique_ptr<HttpsPage> page_;
};

constexpr char kGet[] = "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";

TEST_F(HttpsPageTest, AnswersWhoShowsACertificate) {
  const std::string answer = Ask(kGet, ca_.Issue());
  EXPECT_THAT(answer.substr(0, 200),
              AllOf(StartsWith("HTTP/1.1 200 OK\r\n"), HasSubstr("Content-Length: 300000\r\n"),
                    HasSubstr("Content-Type: text/plain; version=0.0.4\r\n")));
  EXPECT_THAT(answer, EndsWith("\r\n\r\n" + std::string(300000, 'm')));
  EXPECT_THAT(Ask("GET /metrics?x=1 HTTP/1.1\r\n\r\n", ca_.Issue()).substr(0, 20),
              StartsWith("HTTP/1.1 200 OK"));
  EXPECT_THAT(Ask("GET /metricsx HTTP/1.1\r\n\r\n", ca_.Issue()), StartsWith("HTTP/1.1 404"));
  EXPECT_THAT(Ask("POST /metrics HTTP/1.1\r\n\r\n", ca_.Issue()), StartsWith("HTTP/1.1 404"));
}

TEST_F(HttpsPageTest, AnswersNobodyElse) {
  const TestCa other("another");
  EXPECT_THAT(Ask(kGet, other.Issue()), IsEmpty());
  EXPECT_THAT(Ask(kGet, ca_.Issue(-absl::Minutes(1))), IsEmpty());
  // In the clear.
  const Fd plain = Connect();
  EXPECT_EQ(send(plain.get(), kGet, sizeof(kGet) - 1, MSG_NOSIGNAL),
            static_cast<ssize_t>(sizeof(kGet) - 1));
  std::string said;
  char piece[512];
  for (ssize_t n; (n = recv(plain.get(), piece, sizeof(piece), 0)) > 0;) said.append(piece, n);
  EXPECT_THAT(said, testing::Not(HasSubstr("HTTP")));
  // And no endless request.
  EXPECT_THAT(Ask("GET /metrics HTTP/1.1\r\n" + std::string(100000, 'a'), ca_.Issue()), IsEmpty());
}

// Who connects and says nothing is sent away after some seconds.
TEST_F(HttpsPageTest, StrangersKeepNobodyOut) {
  std::vector<Fd> silent;
  for (int i = 0; i < 6; ++i) silent.push_back(Connect());
  EXPECT_THAT(Ask(kGet, ca_.Issue()).substr(0, 20), StartsWith("HTTP/1.1 200 OK"));
}

TEST_F(HttpsPageTest, SaysWhatIsInTheWay) {
  const auto second =
      HttpsPage::Serve({"127.0.0.1", page_->port()}, "/", "", nullptr, With(ca_.Issue()));
  EXPECT_THAT(std::string(second.status().message()), HasSubstr("port in use"));
}

TEST(Metrics, AreServedOverHttps) {
  const TestCa ca("cluster");
  const TestCertificate own = ca.Issue();
  Metrics metrics;
  ASSERT_OK(metrics.Serve("127.0.0.1:0", [&] {
    return TlsTexts{own.certificate, own.key, ca.certificate(), 1};
  }));
  EXPECT_THAT(metrics.address(), AllOf(StartsWith("127.0.0.1:"), testing::Not(EndsWith(":0"))));
}

}  // namespace
}  // namespace tandem
