#include "common/rpc/cluster_clients.h"

#include <algorithm>
#include <set>
#include <utility>

#include "absl/time/clock.h"
#include "spdlog/spdlog.h"

#include "common/base/status.h"

namespace tandem {
namespace {

constexpr absl::Duration kBetweenWarnings = absl::Seconds(10);

}  // namespace

ClusterClients::ClusterClients(ClusterClientsOptions options)
    : options_(std::move(options)), resolver_(options_.resolve), thread_([this] { Run(); }) {}

ClusterClients::~ClusterClients() {
  std::map<std::string, Router> leaving;
  {
    absl::MutexLock lock(&mutex_);
    stopping_ = true;
    leaving.swap(routers_);
  }
  resolver_.Stop();
  leaving.clear();  // without the lock, which their callbacks take
  thread_.join();
}

void ClusterClients::PostLoad(const internal::v1::LoadReport& load) {
  absl::MutexLock lock(&mutex_);
  for (const auto& [address, router] : routers_) router.client->PostLoad(load);
  load_ = load;
  has_load_ = true;
}

void ClusterClients::PostHeartbeat(absl::Duration without_progress) {
  absl::MutexLock lock(&mutex_);
  for (const auto& [address, router] : routers_) router.client->PostHeartbeat(without_progress);
}

void ClusterClients::PostBlocks(const internal::v1::BlockEvents& events) {
  absl::MutexLock lock(&mutex_);
  for (const auto& [address, router] : routers_) router.client->PostBlocks(events);
}

void ClusterClients::PostDraining() {
  absl::MutexLock lock(&mutex_);
  draining_ = true;
  for (const auto& [address, router] : routers_) router.client->PostDraining();
}

void ClusterClients::Run() {
  while (true) {
    Look();
    absl::MutexLock lock(&mutex_);
    const bool complete =
        !routers_.empty() && std::all_of(routers_.begin(), routers_.end(), [](const auto& router) {
          return router.second.client->joined();
        });
    if (mutex_.AwaitWithTimeout(absl::Condition(&stopping_),
                                complete ? options_.calm : options_.eager)) {
      return;
    }
  }
}

void ClusterClients::Look() {
  const std::vector<std::string> found = Addresses();
  std::vector<std::unique_ptr<ClusterClient>> done;  // ended without the lock
  std::vector<std::string> forgotten;
  size_t routers = 0, joined = 0;
  {
    absl::MutexLock lock(&mutex_);
    if (stopping_) return;
    for (auto it = routers_.begin(); it != routers_.end();) {
      auto& [address, router] = *it;
      if (!router.client->joined() &&
          std::find(found.begin(), found.end(), address) == found.end()) {
        spdlog::info("no name has the router {} any more", address);
        forgotten.push_back(address);
        done.push_back(std::move(router.client));
        it = routers_.erase(it);
        continue;
      }
      // Whoever refused may be another process by now, or be told otherwise.
      if (!router.refusal.ok()) {
        router.refusal = absl::OkStatus();
        done.push_back(std::exchange(router.client, Dial(address)));
      }
      ++it;
    }
    for (const std::string& address : found) {
      Router& router = routers_[address];
      if (router.client == nullptr) router.client = Dial(address);
    }
    routers = routers_.size();
    for (const auto& [name, hosts] : resolved_) routers += hosts.empty() ? 1 : 0;
    for (const auto& [address, router] : routers_) joined += router.client->joined() ? 1 : 0;
  }
  done.clear();
  if (options_.vouchers != nullptr) {
    for (const std::string& address : forgotten) options_.vouchers->Forget(address);
  }
  if (options_.on_look) options_.on_look(routers, joined);
}

std::vector<std::string> ClusterClients::Addresses() {
  std::set<std::string> addresses;
  for (const HostPort& router : options_.routers) {
    const std::string name = router.ToString();
    absl::StatusOr<std::vector<std::string>> hosts = resolver_.Hosts(router.host);
    if (hosts.ok()) {
      resolved_[name] = *std::move(hosts);
    } else if (!absl::IsCancelled(hosts.status()) &&
               absl::Now() - last_warning_ > kBetweenWarnings) {
      // Those that it had before stay: a name service that fails is no router that has gone.
      last_warning_ = absl::Now();
      spdlog::warn("router {}: {}", name, MessageOf(hosts.status()));
    }
    for (const std::string& host : resolved_[name]) {
      addresses.insert(HostPort{host, router.port}.ToString());
    }
  }
  return {addresses.begin(), addresses.end()};
}

std::unique_ptr<ClusterClient> ClusterClients::Dial(const std::string& address) {
  ClusterClientOptions client;
  client.router_address = address;
  client.credentials = options_.credentials;
  client.hello = options_.hello;
  client.on_dial = [this, address] {
    if (options_.vouchers != nullptr) options_.vouchers->Await(address);
  };
  client.on_welcome = [this, address](const internal::v1::Welcome& welcome) {
    OnWelcome(address, welcome);
  };
  client.on_joined = options_.on_joined;
  client.on_drain = options_.on_drain;
  client.on_refused = [this, address](const absl::Status& status) { OnRefused(address, status); };
  std::unique_ptr<ClusterClient> started = ClusterClient::Start(std::move(client));
  if (has_load_) started->PostLoad(load_);
  if (draining_) started->PostDraining();
  return started;
}

void ClusterClients::OnWelcome(const std::string& address, const internal::v1::Welcome& welcome) {
  if (options_.vouchers != nullptr) options_.vouchers->SetKey(address, welcome.vouch_key());
  absl::MutexLock lock(&mutex_);
  member_ = true;
}

void ClusterClients::OnRefused(const std::string& address, const absl::Status& status) {
  {
    absl::MutexLock lock(&mutex_);
    const auto it = routers_.find(address);
    if (it == routers_.end()) return;  // it is being left
    Router& router = it->second;
    router.refusal = status;
    const bool by_all = std::all_of(routers_.begin(), routers_.end(),
                                    [](const auto& other) { return !other.second.refusal.ok(); });
    if (member_ || !by_all) {
      if (std::exchange(router.said_refusal, MessageOf(status)) == MessageOf(status)) return;
      spdlog::warn("router {} refuses this worker: {}; dialling again, and the others", address,
                   MessageOf(status));
      return;
    }
  }
  if (options_.on_refused) options_.on_refused(status);
}

}  // namespace tandem
