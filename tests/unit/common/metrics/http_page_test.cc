// A page over HTTP and HTTPS: to whom it is shown, and that nobody keeps others from it.
#include "common/metrics/http_page.h"

#include <arpa/inet.h>
#include <cerrno>
#include <netinet/in.h>
#include <string>
#include <sys/socket.h>
#include <utility>
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
  // The type is what the client says that it accepts. Nobody is sent away, by default.
  static std::unique_ptr<HttpPage> Serve(std::function<TlsTexts()> texts,
                                         absl::Duration patience = absl::Hours(1)) {
    auto page = HttpPage::Serve(
        {"127.0.0.1", 0}, "/metrics",
        [](const std::string& accept) {
          return HttpContent{accept, std::string(kBody, 'm')};
        },
        std::move(texts), patience);
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
  static void Say(const Fd& fd, const std::string& text) {
    EXPECT_EQ(send(fd.get(), text.data(), text.size(), MSG_NOSIGNAL),
              static_cast<ssize_t>(text.size()));
  }
  // Whether the page has neither answered nor closed the connection.
  static bool Waits(const Fd& fd) {
    char byte = 0;
    return recv(fd.get(), &byte, 1, MSG_DONTWAIT) < 0 && errno == EAGAIN;
  }
  // All that comes after `request`, in the clear; empty if nothing does.
  static std::string Ask(const HttpPage& page, const std::string& request) {
    const Fd fd = Connect(page);
    Say(fd, request);
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

constexpr char kHalfAHandshake[] = "\x16\x03\x01\x02";

// Also where they are more than are served at a time: then the oldest go.
TEST_F(HttpPageTest, StrangersKeepNobodyOut) {
  for (const HttpPage* page : {http_.get(), https_.get()}) {
    std::vector<Fd> strangers;
    for (int i = 0; i < 40; ++i) {
      strangers.push_back(Connect(*page));
      if (i % 2 == 0) Say(strangers.back(), page == http_.get() ? "GET /met" : kHalfAHandshake);
    }
    const std::string answer = page == http_.get() ? Ask(*page, kGet) : Ask(kGet, ca_.Issue());
    EXPECT_THAT(answer.substr(0, 20), StartsWith("HTTP/1.1 200 OK"));
    EXPECT_FALSE(Waits(strangers[0]));
    EXPECT_TRUE(Waits(strangers[20]));
  }
}

TEST_F(HttpPageTest, WhoReadsNothingKeepsNobodyOut) {
  std::vector<Fd> asked;
  for (int i = 0; i < 10; ++i) {
    asked.push_back(Connect(*http_));
    Say(asked.back(), kGet);
  }
  EXPECT_THAT(Ask(*http_, kGet), EndsWith(std::string(kBody, 'm')));
}

TEST_F(HttpPageTest, ARequestMayComeByteByByte) {
  const Fd fd = Connect(*http_);
  const std::string request = kGet;
  for (const char byte : request) {
    EXPECT_TRUE(Waits(fd));
    Say(fd, {byte});
  }
  std::string begin(15, '\0');
  EXPECT_EQ(recv(fd.get(), begin.data(), begin.size(), MSG_WAITALL), 15);
  EXPECT_EQ(begin, "HTTP/1.1 200 OK");
}

// Whether it says nothing, or something now and then.
TEST_F(HttpPageTest, NobodyIsServedForLong) {
  const auto hasty = Serve(nullptr, absl::Milliseconds(50));
  const auto hasty_tls = Serve(With(ca_.Issue()), absl::Milliseconds(50));
  for (const HttpPage* page : {hasty.get(), hasty_tls.get()}) {
    for (const bool speaks : {false, true}) {
      const Fd fd = Connect(*page);
      int waits = 0;
      for (; Waits(fd); ++waits) {
        if (speaks) (void)!send(fd.get(), "\x16", 1, MSG_NOSIGNAL);
        absl::SleepFor(absl::Milliseconds(1));
      }
      EXPECT_LT(waits, 10000);  // the longest request is longer
    }
  }
}

TEST_F(HttpPageTest, EndsWhileClientsHang) {
  auto http = Serve(nullptr), https = Serve(With(ca_.Issue()));
  const std::vector<std::pair<const HttpPage*, std::string>> said = {
      {http.get(), ""}, {http.get(), kGet}, {https.get(), ""}, {https.get(), kHalfAHandshake}};
  std::vector<Fd> clients;
  for (const auto& [page, text] : said) {
    clients.push_back(Connect(*page));
    Say(clients.back(), text);
  }
  http = nullptr;
  https = nullptr;
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
