// One page over HTTPS, for who shows a certificate: what civetweb, which serves it in the clear,
// does only where the development files of OpenSSL are installed.
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

class HttpsPage {
 public:
  // Answers GET of `path` with what `page` returns as `content_type`. `texts` says what to show and
  // whom to believe; both are asked from any thread. UNAVAILABLE names the address.
  static absl::StatusOr<std::unique_ptr<HttpsPage>> Serve(const HostPort& address, std::string path,
                                                          std::string content_type,
                                                          std::function<std::string()> page,
                                                          std::function<TlsTexts()> texts);
  ~HttpsPage();

  int port() const { return port_; }

 private:
  HttpsPage(Fd listener, int port, std::string path, std::string content_type,
            std::function<std::string()> page, std::function<TlsTexts()> texts);

  void Run();
  void Answer(int fd);
  std::string AnswerTo(const std::string& request) const;

  const Fd listener_;
  const Fd stop_;  // an eventfd: readable for ever once this ends
  const int port_;
  const std::string path_;
  const std::string content_type_;
  const std::function<std::string()> page_;
  TlsContexts contexts_;
  std::vector<std::thread> threads_;  // last: they use the rest
};

}  // namespace tandem
