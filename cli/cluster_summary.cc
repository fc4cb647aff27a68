#include "cli/cluster_summary.h"

#include <algorithm>
#include <array>
#include <cstdint>

#include "fmt/format.h"

#include "cli/command.h"
#include "cli/units.h"

namespace tandem::cli {
namespace {

// What all workers that decode can take together.
struct Room {
  uint64_t tokens = 0;
  uint64_t longest = 0;  // sequences of the greatest length
  uint64_t sequences = 0;
};

Room RoomOf(const v1::GetClusterResponse& cluster) {
  Room room;
  for (const v1::Worker& worker : cluster.workers()) {
    if (worker.role() == "prefill") continue;
    const uint64_t tokens = uint64_t{worker.blocks_total()} * cluster.block_size();
    room.tokens += tokens;
    room.longest += tokens / std::max<uint64_t>(cluster.max_model_len(), 1);
    room.sequences += worker.max_num_seqs();
  }
  return room;
}

std::string Shortened(const std::string& text, int width) {
  const auto most = static_cast<size_t>(std::max(width, 4));
  return text.size() <= most ? text : text.substr(0, most - 3) + "...";
}

}  // namespace

std::string RolesText(const v1::GetClusterResponse& cluster) {
  std::string text;
  for (const char* role : {"prefill", "decode", "unified"}) {
    const auto count = std::count_if(cluster.workers().begin(), cluster.workers().end(),
                                     [role](const v1::Worker& w) { return w.role() == role; });
    if (count > 0) text += fmt::format("{}{} {}", text.empty() ? "" : ", ", count, role);
  }
  return text;
}

std::string SummaryText(const v1::GetClusterResponse& cluster, const ClusterPlaces& places,
                        int width) {
  const Room room = RoomOf(cluster);
  const std::string server = places.address == kDefaultServer ? "" : " --server " + places.address;
  const std::array<std::pair<const char*, std::string>, 10> lines = {{
      {"model", fmt::format("{} ({})", cluster.model(), cluster.dtype())},
      {"workers", RolesText(cluster)},
      {"KV cache", fmt::format("{} tokens to decode in", CountText(room.tokens))},
      {"longest", fmt::format("{} tokens, prompt and answer; {} of them fit at once",
                              CountText(cluster.max_model_len()), CountText(room.longest))},
      {"concurrency",
       fmt::format("{} streams decode at once, more wait", CountText(room.sequences))},
      {"API", places.address + " (gRPC)"},
      {"operators", places.internal + " (internal, workers join there)"},
      {"metrics", fmt::format("http://{}/metrics", places.metrics)},
      {"try", "tandem chat" + server},
      {"", fmt::format("tandem status{} --watch", server)},
  }};
  std::string text = "\n";
  for (const auto& [name, value] : lines) {
    text += Shortened(fmt::format("  {:<13}{}", name, value), width) + "\n";
  }
  return text + Shortened("  stop         Ctrl-C: streams end first; a second one kills", width) +
         "\n\n";
}

}  // namespace tandem::cli
