// Changes of a prefix cache that wait to be sent: the net effect of a sequence of BlockEvents.
#pragma once

#include <cstddef>
#include <list>
#include <optional>
#include <string>
#include <string_view>

#include "absl/container/flat_hash_map.h"

#include "tandem/internal/v1/cluster.pb.h"

namespace tandem {

// Not thread-safe; everything costs O(1) per hash. A hash counts once, as what was said of it last:
// so merged events mean the same as the sequence did, in whatever order a receiver applies `stored`
// and `removed`.
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
    std::string hash;
    bool stored = false;
  };
  void Note(const std::string& hash, bool stored);

  std::list<Change> order_;  // of arrival: parents are stored before their children
  absl::flat_hash_map<std::string_view, std::list<Change>::iterator> last_;  // into `order_`
  bool cleared_ = false;
};

}  // namespace tandem
