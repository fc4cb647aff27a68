// A worker that was lost with a request, and what has become of it.
//
// A call that breaks says little of the process at its other end: it may have died of the request,
// or have been stopped for a while, or be cut off, or merely wait for a processor. What it does
// afterwards says more.
#pragma once

#include <cstdint>
#include <string>

#include "absl/time/time.h"

#include "router/registry/cluster_view.h"

namespace tandem::router {

struct Loss {
  std::string worker;        // its id
  uint64_t incarnation = 0;  // of the process: another one of the same name is another worker
  absl::Time at;             // the last time, of several

  bool SameProcess(const Loss& other) const {
    return worker == other.worker && incarnation == other.incarnation;
  }
};

enum class Fate {
  kUnknown,  // in the cluster, and has said nothing since
  kGone,     // not in the cluster: it died, as far as anybody knows
  kLives,    // it has got somewhere since, so it did not die of the request
};

// What `view` says. Until this long after a loss what arrives may have been on its way before.
constexpr absl::Duration kWordsOfTheDead = absl::Milliseconds(250);

inline Fate FateOf(const Loss& loss, const ClusterView& view) {
  const WorkerView* worker = view.Find(loss.worker);
  if (worker == nullptr || worker->identity->incarnation != loss.incarnation) return Fate::kGone;
  return worker->progressed >= loss.at + kWordsOfTheDead ? Fate::kLives : Fate::kUnknown;
}

}  // namespace tandem::router
