#include "kvtransfer/transport/kv_transport.h"

#include <algorithm>

#include "absl/strings/match.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"

#include "common/base/status.h"

namespace tandem::kvtransfer {
namespace {

class DonePost : public KvPost {
 public:
  DonePost(absl::Status status, std::vector<uint64_t> digests)
      : status_(std::move(status)), digests_(std::move(digests)) {}
  bool Done() override { return true; }
  const absl::Status& status() const override { return status_; }
  std::span<const uint64_t> digests() const override { return digests_; }

 private:
  const absl::Status status_;
  const std::vector<uint64_t> digests_;
};

}  // namespace

std::unique_ptr<KvPost> CompletedPost(absl::Status status, std::vector<uint64_t> digests) {
  return std::make_unique<DonePost>(std::move(status), std::move(digests));
}

const std::vector<KvTransport*>& KnownTransports() {
  static const auto* known = new std::vector<KvTransport*>{
      CudaIpcTransport(), ShmTransport(), ShmRingTransport(), NcclTransport(), TcpTransport()};
  return *known;
}

absl::StatusOr<std::vector<KvTransport*>> ParseTransports(const std::string& text) {
  std::vector<KvTransport*> chosen;
  if (text == "auto") {
    chosen = KnownTransports();
    std::erase(chosen, NcclTransport());
    return chosen;
  }
  for (const absl::string_view part : absl::StrSplit(text, ',')) {
    const std::string name(part);
    const auto& known = KnownTransports();
    const auto it = std::find_if(known.begin(), known.end(),
                                 [&](const KvTransport* t) { return t->name() == name; });
    if (it == known.end()) {
      const std::string names = absl::StrJoin(
          known, ", ", [](std::string* out, const KvTransport* t) { out->append(t->name()); });
      return InvalidArgument("--kv-transport must be auto or some of {}, got {}", names, name);
    }
    if (std::find(chosen.begin(), chosen.end(), *it) != chosen.end()) {
      return InvalidArgument("--kv-transport names {} twice", name);
    }
    chosen.push_back(*it);
    if (*it == ShmTransport() && !absl::StrContains(text, ShmRingTransport()->name())) {
      chosen.push_back(ShmRingTransport());
    }
  }
  return chosen;
}

}  // namespace tandem::kvtransfer
