// One page over HTTP, or over HTTPS for who shows a certificate.
//
// One thread has all clients under way at once and waits for none of them, so who says nothing, or
// reads nothing, keeps nobody else out. A connection is for one request, and has some seconds for
// it; where there are too many, the oldest makes room for the newest.
#pragma once

#include <functional>
#include <list>
#include <memory>
#include <string>
#include <thread>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "common/base/fd.h"
#include "common/base/host_port.h"
#include "common/base/tls_stream.h"

namespace tandem {

struct HttpContent {
  std::string type;  // "text/plain; ..."
  std::string body;
};

class HttpPage {
 public:
  // What is shown to who sends this Accept header; "" to who sends none.
  using Page = std::function<HttpContent(const std::string& accept)>;

  // Answers GET of `path` with what `page` returns. `texts` says what to show and whom to believe;
  // null: it is plain HTTP. Both are asked from a thread of the page. A connection lasts no longer
  // than `patience`. UNAVAILABLE names the address.
  static absl::StatusOr<std::unique_ptr<HttpPage>> Serve(
      const HostPort& address, std::string path, Page page,
      std::function<TlsTexts()> texts = nullptr, absl::Duration patience = absl::Seconds(10));
  // Waits for no client.
  ~HttpPage();

  int port() const { return port_; }

 private:
  class Connection;
  class TlsConnection;
  struct Client;

  HttpPage(Fd listener, int port, std::string path, Page page, std::function<TlsTexts()> texts,
           absl::Duration patience);

  void Run();
  void Accept(std::list<Client>* clients);
  // Goes on as far as the client lets it; false: it is over.
  bool GoOn(Client* client) const;
  // Until there is an answer.
  bool Listen(Client* client) const;
  bool Answer(Client* client) const;
  std::string AnswerTo(const std::string& request) const;

  const Fd listener_;
  const Fd stop_;  // an eventfd: readable for ever once this ends
  const int port_;
  const std::string path_;
  const Page page_;
  const std::unique_ptr<TlsContexts> contexts_;  // null: plain HTTP
  const absl::Duration patience_;
  std::thread thread_;  // last: it uses the rest
};

}  // namespace tandem
