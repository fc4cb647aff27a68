// Changes of a prefix cache that wait to be sent: the net effect of a sequence of BlockEvents.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "absl/container/flat_hash_map.h"

#include "tandem/internal/v1/cluster.pb.h"

namespace tandem {

// Not thread-safe. A hash counts once, as what was said of it last: so merged events mean the same
// as the sequence did, in whatever order a receiver applies `stored` and `removed`.
class PendingBlocks {
 public:
  // Applied as: `cleared`, then `stored`, then `removed`.
  void Merge(const internal::v1::BlockEvents& events);
  // The oldest of what is pending, at most `max_hashes`; nothing if there is none.
  std::optional<internal::v1::BlockEvents> Take(size_t max_hashes);
  void Clear();

  bool empty() const { return last_.empty() && !cleared_; }
  size_t size() const { return last_.size(); }

 private:
  struct Change {
    uint64_t sequence = 0;  // order of arrival: parents are stored before their children
    bool stored = false;
  };
  void Note(const std::string& hash, bool stored);

  absl::flat_hash_map<std::string, Change> last_;
  uint64_t next_sequence_ = 0;
  bool cleared_ = false;
};

}  // namespace tandem
