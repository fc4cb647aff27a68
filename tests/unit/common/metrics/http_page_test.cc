// A page over HTTP and HTTPS: to whom it is shown, and that nobody keeps others from it.
#include "common/metrics/http_page.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <string>
#include <sys/socket.h>
#include <vector>

#include "absl/time/clock.h"
#include "fmt/format.h"
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

// Large enough that no socket takes it at once.
constexpr size_t kBody = 3000000;

class HttpPageTest : public testing::Test {
 protected:
  // The type is what the client says that it accepts.
  static std::unique_ptr<HttpPage> Serve(std::function<TlsTexts()> texts) {
    auto page = HttpPage::Serve(
        {"127.0.0.1", 0}, "/metrics",
        [](const std::string& accept) {
          return HttpContent{accept, std::string(kBody, 'm')};
        },
        std::move(texts));
    EXPECT_OK(page);
    return *std::move(page);
  }
  std::function<TlsTexts()> With(const TestCertificate& own) const {
    const TlsTexts texts = {own.certificate, own.key, ca_.certificate(), 1};
    return [texts] { return texts; };
  }
  static Fd Connect(const HttpPage& page) {
    Fd fd(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_in to = {};
    to.sin_family = AF_INET;
    to.sin_port = htons(static_cast<uint16_t>(page.port()));
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    EXPECT_EQ(connect(fd.get(), reinterpret_cast<sockaddr*>(&to), sizeof(to)), 0);
    return fd;
  }
  // All that comes after `request`, in the clear; empty if nothing does.
  static std::string Ask(const HttpPage& page, const std::string& request) {
    const Fd fd = Connect(page);
    EXPECT_EQ(send(fd.get(), request.data(), request.size(), MSG_NOSIGNAL),
              static_cast<ssize_t>(request.size()));
    std::string answer, piece(5000, '\0');
    for (ssize_t n; (n = recv(fd.get(), piece.data(), piece.size(), 0)) > 0;) {
      answer.append(piece, 0, static_cast<size_t>(n));
    }
    return answer;
  }
  // The same with TLS.
  std::string Ask(const std::string& request, const TestCertificate& own) const {
    const Fd fd = Connect(*https_);
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
  const std::unique_ptr<HttpPage> http_ = Serve(nullptr);
  const std::unique_ptr<HttpPage> https_ = Serve(With(ca_.Issue()));
};

constexpr char kGet[] = "GET /metrics HTTP/1.1\r\nHost: x\r\naccept:  text/x \r\n\r\n";

TEST_F(HttpPageTest, AnswersInTheClear) {
  const std::string answer = Ask(*http_, kGet);
  EXPECT_THAT(answer.substr(0, 200), AllOf(StartsWith("HTTP/1.1 200 OK\r\n"),
                                           HasSubstr(fmt::format("Content-Length: {}\r\n", kBody)),
                                           HasSubstr("Content-Type: text/x\r\n")));
  EXPECT_THAT(answer, EndsWith("\r\n\r\n" + std::string(kBody, 'm')));
  EXPECT_THAT(Ask(*http_, "GET /metrics?x=1 HTTP/1.1\r\n\r\n").substr(0, 60),
              AllOf(StartsWith("HTTP/1.1 200 OK\r\n"), HasSubstr("Content-Type: \r\n")));
  EXPECT_THAT(Ask(*http_, "GET /metricsx HTTP/1.1\r\n\r\n"), StartsWith("HTTP/1.1 404"));
  EXPECT_THAT(Ask(*http_, "POST /metrics HTTP/1.1\r\n\r\n"), StartsWith("HTTP/1.1 404"));
}

TEST_F(HttpPageTest, AnswersWhoShowsACertificate) {
  const std::string answer = Ask(kGet, ca_.Issue());
  EXPECT_THAT(answer.substr(0, 200),
              AllOf(StartsWith("HTTP/1.1 200 OK\r\n"), HasSubstr("Content-Type: text/x\r\n")));
  EXPECT_THAT(answer, EndsWith("\r\n\r\n" + std::string(kBody, 'm')));
}

TEST_F(HttpPageTest, AnswersNobodyElse) {
  const TestCa other("another");
  EXPECT_THAT(Ask(kGet, other.Issue()), IsEmpty());
  EXPECT_THAT(Ask(kGet, ca_.Issue(-absl::Minutes(1))), IsEmpty());
  // In the clear.
  EXPECT_THAT(Ask(*https_, kGet), testing::Not(HasSubstr("HTTP")));
  // And no endless request.
  const std::string endless = "GET /metrics HTTP/1.1\r\n" + std::string(100000, 'a');
  EXPECT_THAT(Ask(endless, ca_.Issue()), IsEmpty());
}

// Who connects and says nothing is sent away after some seconds.
TEST_F(HttpPageTest, StrangersKeepNobodyOut) {
  std::vector<Fd> silent;
  for (int i = 0; i < 6; ++i) silent.push_back(Connect(i % 2 == 0 ? *http_ : *https_));
  EXPECT_THAT(Ask(*http_, kGet).substr(0, 20), StartsWith("HTTP/1.1 200 OK"));
  EXPECT_THAT(Ask(kGet, ca_.Issue()).substr(0, 20), StartsWith("HTTP/1.1 200 OK"));
}

TEST_F(HttpPageTest, SaysWhatIsInTheWay) {
  const auto second = HttpPage::Serve({"127.0.0.1", http_->port()}, "/", nullptr);
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
