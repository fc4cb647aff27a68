// One page over HTTP, or over HTTPS for who shows a certificate.
//
// Its threads answer one request per connection. Nobody holds one for longer than some seconds.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"

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
  // null: it is plain HTTP. Both are asked from any thread. UNAVAILABLE names the address.
  static absl::StatusOr<std::unique_ptr<HttpPage>> Serve(const HostPort& address, std::string path,
                                                         Page page,
                                                         std::function<TlsTexts()> texts = nullptr);
  ~HttpPage();

  int port() const { return port_; }

 private:
  class Connection;
  class TlsConnection;

  HttpPage(Fd listener, int port, std::string path, Page page, std::function<TlsTexts()> texts);

  void Run();
  void Answer(int fd);
  // Null: whoever dialled is not let in.
  std::unique_ptr<Connection> Accept(int fd);
  std::string AnswerTo(const std::string& request) const;

  const Fd listener_;
  const Fd stop_;  // an eventfd: readable for ever once this ends
  const int port_;
  const std::string path_;
  const Page page_;
  const std::unique_ptr<TlsContexts> contexts_;  // null: plain HTTP
  std::vector<std::thread> threads_;             // last: they use the rest
};

}  // namespace tandem
