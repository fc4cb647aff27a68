// The hosts that a name stands for, for who wants a connection to each of them.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace tandem {

// What the system's resolver says of `host` now, as OneOfEach puts it: at least one. UNAVAILABLE
// says why there is none. Waits for the resolver, with its patience (/etc/resolv.conf); numeric
// hosts are answered at once.
absl::StatusOr<std::vector<std::string>> ResolveHosts(const std::string& host);

// Asks on a thread of its own, so that who waits can be told to stop: nothing ends a call of the
// system's resolver, and where no name service answers it takes half a minute. Such a call is left
// behind, with all that it needs.
//
// Thread-safe.
class Resolver {
 public:
  using Ask = std::function<absl::StatusOr<std::vector<std::string>>(const std::string& host)>;

  // `ask` may be called after this is gone.
  explicit Resolver(Ask ask = ResolveHosts);
  ~Resolver() { Stop(); }
  Resolver(const Resolver&) = delete;

  // As `ask`; CANCELLED once Stop() has been called.
  absl::StatusOr<std::vector<std::string>> Hosts(const std::string& host);
  // Whoever waits is told so at once.
  void Stop();

 private:
  struct State;
  const std::shared_ptr<State> state_;
};

// One entry for each host, sorted, of the addresses that `name` has: a host may have one of each
// family, so those of the larger family count, and of IPv4 where both are as large. One of each may
// be the same host under two addresses, of which perhaps one answers ("localhost"): the name
// itself, for who can try both.
std::vector<std::string> OneOfEach(const std::string& name, std::vector<std::string> ipv4,
                                   std::vector<std::string> ipv6);

}  // namespace tandem
