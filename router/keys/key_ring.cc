#include "router/keys/key_ring.h"

#include <utility>

#include "absl/strings/match.h"
#include "spdlog/spdlog.h"

#include "common/auth/api_key.h"
#include "common/base/status.h"

namespace tandem::router {
namespace {

constexpr std::string_view kScheme = "bearer ";

// "" for anything else than "Bearer KEY".
std::string_view KeyIn(std::string_view authorization) {
  if (authorization.size() < kScheme.size() ||
      !absl::EqualsIgnoreCase({authorization.data(), kScheme.size()},
                              {kScheme.data(), kScheme.size()})) {
    return "";
  }
  return authorization.substr(kScheme.size());
}

}  // namespace

KeyRing::KeyRing(std::string path, Metrics* metrics, Clock* clock)
    : path_(std::move(path)),
      metrics_(metrics),
      clock_(clock),
      broken_(KeysFileBroken(metrics)),
      digests_(std::make_shared<const Digests>()) {}

absl::StatusOr<std::unique_ptr<KeyRing>> KeyRing::Open(const std::string& path, Metrics* metrics,
                                                       Clock* clock) {
  std::unique_ptr<KeyRing> ring(new KeyRing(path, metrics, clock));
  FileWatch::Contents contents = FileWatch::Read({path});
  TANDEM_RETURN_IF_ERROR(ring->Take(contents.front()));
  ring->watch_ = std::make_unique<FileWatch>(
      std::vector<std::string>{path}, std::move(contents),
      [self = ring.get()](const FileWatch::Contents& now) { return self->Take(now.front()); });
  return ring;
}

absl::Status KeyRing::Reload() { return Take(FileWatch::Read({path_}).front()); }

absl::Status KeyRing::Take(const absl::StatusOr<std::string>& text) {
  absl::MutexLock lock(&take_mutex_);
  absl::StatusOr<std::vector<ApiKeyEntry>> entries =
      text.ok() ? ParseApiKeys(*text) : absl::StatusOr<std::vector<ApiKeyEntry>>(text.status());
  broken_.Set(entries.ok() ? 0 : 1);
  if (!entries.ok()) {
    return InvalidArgument("--api-keys-file {}: {}", path_, MessageOf(entries.status()));
  }
  TakeOver(*std::move(entries));
  return absl::OkStatus();
}

void KeyRing::TakeOver(std::vector<ApiKeyEntry> entries) {
  const absl::Time now = clock_->Now();
  auto digests = std::make_shared<Digests>();
  const size_t names = entries.size();
  for (ApiKeyEntry& entry : entries) {
    std::shared_ptr<Allowance>& allowance = allowances_[entry.name];
    if (allowance == nullptr) allowance = std::make_shared<Allowance>(metrics_, entry.name);
    allowance->SetRates(entry, now);
    const auto holder = std::make_shared<const KeyHolder>(KeyHolder{std::move(entry), allowance});
    for (const std::string& digest : holder->entry.digests) digests->emplace(digest, holder);
  }
  {
    absl::MutexLock lock(&mutex_);
    digests_ = std::move(digests);
  }
  spdlog::info("{} API keys of {} are in force", names, path_);
}

std::shared_ptr<const KeyHolder> KeyRing::Find(std::string_view key) const {
  std::shared_ptr<const Digests> digests;
  {
    absl::MutexLock lock(&mutex_);
    digests = digests_;
  }
  const auto found = digests->find(ApiKeyDigest(key));
  return found == digests->end() ? nullptr : found->second;
}

absl::StatusOr<std::shared_ptr<const KeyHolder>> KeyRing::Admit(std::string_view authorization) {
  const std::string_view key = KeyIn(authorization);
  if (key.empty()) {
    return absl::UnauthenticatedError(
        "an API key is needed: metadata 'authorization: Bearer KEY' (--api-key or TANDEM_API_KEY "
        "of "
        "tandem's commands)");
  }
  std::shared_ptr<const KeyHolder> holder = Find(key);
  if (holder == nullptr) {
    return absl::UnauthenticatedError("the API key is not one that is in force here");
  }
  TANDEM_RETURN_IF_ERROR(holder->allowance->TakeRequest(holder->entry, clock_->Now()));
  return holder;
}

}  // namespace tandem::router
