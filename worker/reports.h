// What passes between a worker's loop and the frame around it.
#pragma once

#include <functional>

#include "common/base/load_report.h"
#include "engine/kv/prefix_cache.h"

namespace tandem::worker {

// What the loop tells the cluster. Called on the loop's thread; must not block. Each may be
// empty.
struct Reports {
  std::function<void(const LoadReport&)> load;
  // In order. `cleared`: the events are a snapshot that replaces all that came before.
  std::function<void(const engine::BlockEvents&, bool cleared)> blocks;
  // The loop has done another turn.
  std::function<void()> turn;
};

// What the frame of a worker says to its loop, whatever the loop does.
struct SnapshotWanted {};  // a router joined: it needs all block hashes
struct DrainWanted {};     // refuse new work, finish what runs, then stop
struct StopWanted {};      // end everything and stop

}  // namespace tandem::worker
