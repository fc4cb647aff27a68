#include "common/base/resolve.h"

#include <algorithm>
#include <memory>
#include <netdb.h>
#include <optional>
#include <sys/socket.h>
#include <thread>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

#include "common/base/status.h"

namespace tandem {

std::vector<std::string> OneOfEach(const std::string& name, std::vector<std::string> ipv4,
                                   std::vector<std::string> ipv6) {
  for (std::vector<std::string>* family : {&ipv4, &ipv6}) {
    std::sort(family->begin(), family->end());
    family->erase(std::unique(family->begin(), family->end()), family->end());
  }
  if (ipv4.size() == 1 && ipv6.size() == 1) return {name};
  return ipv6.size() > ipv4.size() ? std::move(ipv6) : std::move(ipv4);
}

absl::StatusOr<std::vector<std::string>> ResolveHosts(const std::string& host) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (const int error = getaddrinfo(host.c_str(), nullptr, &hints, &found)) {
    return Unavailable("host '{}' is not known: {}", host, gai_strerror(error));
  }
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> owner(found, freeaddrinfo);
  std::vector<std::string> ipv4, ipv6;
  for (const addrinfo* info = found; info != nullptr; info = info->ai_next) {
    char text[NI_MAXHOST];
    if (getnameinfo(info->ai_addr, info->ai_addrlen, text, sizeof(text), nullptr, 0,
                    NI_NUMERICHOST) != 0) {
      continue;
    }
    if (info->ai_family == AF_INET) ipv4.emplace_back(text);
    if (info->ai_family == AF_INET6) ipv6.emplace_back(text);
  }
  if (ipv4.empty() && ipv6.empty()) return Unavailable("host '{}' has no address", host);
  return OneOfEach(host, std::move(ipv4), std::move(ipv6));
}

struct Resolver::State {
  const Ask ask;
  absl::Mutex mutex;
  bool stopped ABSL_GUARDED_BY(mutex) = false;
};

Resolver::Resolver(Ask ask) : state_(new State{.ask = std::move(ask)}) {}

absl::StatusOr<std::vector<std::string>> Resolver::Hosts(const std::string& host) {
  using Answer = std::optional<absl::StatusOr<std::vector<std::string>>>;
  const auto answer = std::make_shared<Answer>();  // guarded by the state's mutex
  const auto stopped = [&host] {
    return Cancelled("nobody waits for the hosts of '{}' any more", host);
  };
  {
    absl::MutexLock lock(&state_->mutex);
    if (state_->stopped) return stopped();
  }
  std::thread([state = state_, answer, host] {
    auto hosts = state->ask(host);
    absl::MutexLock lock(&state->mutex);
    *answer = std::move(hosts);
  }).detach();
  State& state = *state_;
  absl::MutexLock lock(&state.mutex);
  const auto over = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(state.mutex) {
    return state.stopped || answer->has_value();
  };
  state.mutex.Await(absl::Condition(&over));
  if (state.stopped) return stopped();  // also where the answer has come since
  return *std::move(*answer);
}

void Resolver::Stop() {
  absl::MutexLock lock(&state_->mutex);
  state_->stopped = true;
}

}  // namespace tandem
