#include "cli/doctor_text.h"

#include <algorithm>
#include <limits>
#include <set>
#include <string_view>
#include <utility>

#include "fmt/format.h"

#include "cli/table.h"
#include "common/base/wrap_words.h"
#include "common/config/bytes.h"

namespace tandem::cli {
namespace {

constexpr uint64_t kNoLimit = std::numeric_limits<uint64_t>::max();
constexpr size_t kNameWidth = 12;
// What a link over shm_ring pins, for each peer (--kv-ring-bytes).
constexpr uint64_t kRingBytes = uint64_t{64} << 20;
// A worker with many streams and peers has hundreds of connections.
constexpr uint64_t kFewFiles = 4096;

std::string RateText(double bytes_per_second) {
  return bytes_per_second > 0 ? fmt::format("{:.2f}", bytes_per_second / 1e9) : "-";
}

std::string LargeText(const v1::Link& link) {
  std::string text = RateText(link.large_bytes_per_second());
  const uint64_t megabytes = link.large_bytes() >> 20;
  if (megabytes > 0 && megabytes < 64) text += fmt::format(" ({} MB)", megabytes);
  return text;
}

std::string Sized(uint64_t bytes) {
  return bytes == kNoLimit ? "no limit" : FormatBytes(static_cast<int64_t>(bytes));
}

// "name        text", in lines of at most kDoctorWidth columns.
std::string Line(std::string_view name, std::string_view text) {
  return fmt::format("{:<{}}{}\n", name, kNameWidth,
                     WrapWords(text, kDoctorWidth, kNameWidth, kNameWidth));
}

// Pairs that ship blocks: from each prefill worker to each decode worker.
int PairsWithoutLink(const v1::GetClusterResponse& cluster, int* pairs) {
  std::set<std::pair<std::string, std::string>> linked;
  for (const v1::Link& link : cluster.links()) linked.emplace(link.src(), link.dst());
  int missing = 0;
  *pairs = 0;
  for (const v1::Worker& prefill : cluster.workers()) {
    for (const v1::Worker& decode : cluster.workers()) {
      if (prefill.role() != "prefill" || decode.role() != "decode") continue;
      ++*pairs;
      if (!linked.contains({prefill.worker_id(), decode.worker_id()})) ++missing;
    }
  }
  return missing;
}

std::string WhyNotCudaIpc(const HostFacts& facts, size_t from, size_t to) {
  const GpuFacts& gpu = facts.gpus[from];
  if (!gpu.exports_memory || !facts.gpus[to].exports_memory) {
    return fmt::format("GPU {} cannot share its memory with other processes",
                       gpu.exports_memory ? to : from);
  }
  if (!gpu.reaches[to]) return "no peer access";
  return "";
}

// A limit that is in the way of what a link needs; empty: none is.
std::string WhatIsTooLow(const HostFacts& facts) {
  std::string text;
  if (facts.open_files < kFewFiles) {
    text = fmt::format("open files: {} may be few for many streams; `ulimit -n 65536`",
                       facts.open_files);
  }
  if (!facts.gpus.empty() && facts.locked_bytes < kRingBytes) {
    text += fmt::format("{}locked memory: some drivers count what shm_ring pins, {} for each peer",
                        text.empty() ? "" : "; ", Sized(kRingBytes));
  }
  return text;
}

}  // namespace

std::string LinksText(const v1::GetClusterResponse& cluster) {
  std::vector<std::vector<std::string>> rows = {
      {"src", "dst", "transport", "64 KB", "1 MB", "64 MB", "now", "us", "state"}};
  std::string notes;
  for (const v1::Link& link : cluster.links()) {
    const double us = link.latency_seconds() * 1e6;
    rows.push_back({link.src(), link.dst(), link.transport().empty() ? "none" : link.transport(),
                    RateText(link.small_bytes_per_second()),
                    RateText(link.medium_bytes_per_second()), LargeText(link),
                    RateText(link.bytes_per_second()), us > 0 ? fmt::format("{:.0f}", us) : "-",
                    link.state()});
    if (link.note().empty()) continue;
    notes += WrapWords(fmt::format("{} -> {}: {}", link.src(), link.dst(), link.note()),
                       kDoctorWidth, 2) +
             "\n";
  }
  std::string out;
  if (cluster.links_size() > 0) {
    out = RenderTable(rows, kDoctorWidth, {"64 KB", "now"});
    out += "\nGB/s by the self-test, now: of recent transfers; us: there and back\n";
    if (!notes.empty()) out += "\n" + notes;
  }
  int pairs = 0;
  if (const int missing = PairsWithoutLink(cluster, &pairs); missing > 0) {
    if (!out.empty()) out += "\n";
    out += WrapWords(fmt::format("{} of {} pairs of a prefill and a decode worker have no link "
                                 "yet; one is made by the first request that takes the pair",
                                 missing, pairs),
                     kDoctorWidth, 0) +
           "\n";
  } else if (out.empty()) {
    out = "no worker ships KV blocks to another\n";
  }
  return out;
}

nlohmann::ordered_json LinksJson(const v1::GetClusterResponse& cluster) {
  nlohmann::ordered_json links = nlohmann::ordered_json::array();
  for (const v1::Link& link : cluster.links()) {
    links.push_back({{"src", link.src()},
                     {"dst", link.dst()},
                     {"transport", link.transport()},
                     {"state", link.state()},
                     {"note", link.note()},
                     {"bytes_per_second", link.bytes_per_second()},
                     {"small_bytes_per_second", link.small_bytes_per_second()},
                     {"medium_bytes_per_second", link.medium_bytes_per_second()},
                     {"large_bytes_per_second", link.large_bytes_per_second()},
                     {"large_bytes", link.large_bytes()},
                     {"latency_seconds", link.latency_seconds()},
                     {"least_bytes_per_second", link.least_bytes_per_second()}});
  }
  int pairs = 0;
  const int missing = PairsWithoutLink(cluster, &pairs);
  return {{"links", links}, {"pairs", pairs}, {"pairs_without_link", missing}};
}

bool LinksWork(const v1::GetClusterResponse& cluster) {
  return std::none_of(cluster.links().begin(), cluster.links().end(),
                      [](const v1::Link& link) { return link.state() == "refused"; });
}

std::vector<HostPair> PairsOf(const HostFacts& facts) {
  const bool shares = facts.sharing_error.empty();
  std::vector<HostPair> pairs;
  pairs.push_back({"host", "host", shares ? "shm" : "tcp", facts.sharing_error});
  if (!facts.cuda_built) return pairs;
  for (size_t from = 0; from < facts.gpus.size(); ++from) {
    for (size_t to = 0; to < facts.gpus.size(); ++to) {
      HostPair pair = {fmt::format("GPU {}", from), fmt::format("GPU {}", to), "tcp",
                       facts.sharing_error};
      if (shares) {
        pair.why = WhyNotCudaIpc(facts, from, to);
        pair.transport = pair.why.empty() ? "cuda_ipc" : "shm_ring";
      }
      pairs.push_back(std::move(pair));
    }
  }
  return pairs;
}

std::string HostText(const HostFacts& facts) {
  std::string out =
      Line("CPU", fmt::format("{}, {} cores, {} NUMA {}", facts.cpu, facts.cores, facts.numa_nodes,
                              facts.numa_nodes == 1 ? "node" : "nodes"));
  out += Line("memory", fmt::format("{}, {} may be taken", Sized(facts.memory_bytes),
                                    Sized(facts.memory_available)));
  out += Line("/dev/shm", facts.shm_bytes == 0 ? "not there"
                                               : fmt::format("{}, {} free", Sized(facts.shm_bytes),
                                                             Sized(facts.shm_free)));
  out += Line(
      "limits",
      fmt::format("locked memory {}, open files {}", Sized(facts.locked_bytes),
                  facts.open_files == kNoLimit ? "no limit" : fmt::format("{}", facts.open_files)));
  if (const std::string low = WhatIsTooLow(facts); !low.empty()) out += Line("", low);
  out += Line("sharing", facts.sharing_error.empty()
                             ? "processes can watch each other and share memory"
                             : facts.sharing_error);
  out += Line("CUDA",
              fmt::format("{}; {}", facts.cuda_built ? "built in" : "none in this build: CPU only",
                          facts.driver.empty() ? "no driver: " + facts.driver_error
                                               : "driver for CUDA " + facts.driver));
  for (size_t i = 0; i < facts.gpus.size(); ++i) {
    const GpuFacts& gpu = facts.gpus[i];
    out += Line(fmt::format("GPU {}", i),
                fmt::format("{}, {}, {}{}", gpu.name, Sized(gpu.memory_bytes), gpu.bus,
                            gpu.node >= 0 ? fmt::format(", NUMA node {}", gpu.node) : ""));
  }
  out += "\nKV blocks between two workers of this host (--kv-transport=auto):\n";
  std::vector<std::vector<std::string>> rows = {{"from", "to", "transport", "why no better one"}};
  for (const HostPair& pair : PairsOf(facts)) {
    // "from" and "to" are as wide as "GPU 0" mostly, so the reason begins before column 32.
    rows.push_back({pair.from, pair.to, pair.transport, pair.why.substr(0, kDoctorWidth - 32)});
  }
  return out + RenderTable(rows);
}

nlohmann::ordered_json HostJson(const HostFacts& facts) {
  const auto limit = [](uint64_t value) -> nlohmann::ordered_json {
    if (value == kNoLimit) return nullptr;
    return value;
  };
  nlohmann::ordered_json gpus = nlohmann::ordered_json::array();
  for (const GpuFacts& gpu : facts.gpus) {
    gpus.push_back({{"name", gpu.name},
                    {"memory_bytes", gpu.memory_bytes},
                    {"bus", gpu.bus},
                    {"numa_node", gpu.node},
                    {"exports_memory", gpu.exports_memory},
                    {"peer_access", gpu.reaches}});
  }
  nlohmann::ordered_json pairs = nlohmann::ordered_json::array();
  for (const HostPair& pair : PairsOf(facts)) {
    pairs.push_back(
        {{"from", pair.from}, {"to", pair.to}, {"transport", pair.transport}, {"why", pair.why}});
  }
  return {{"cpu", facts.cpu},
          {"cores", facts.cores},
          {"memory_bytes", facts.memory_bytes},
          {"memory_available", facts.memory_available},
          {"numa_nodes", facts.numa_nodes},
          {"shm_bytes", facts.shm_bytes},
          {"shm_free", facts.shm_free},
          {"locked_bytes", limit(facts.locked_bytes)},
          {"open_files", limit(facts.open_files)},
          {"sharing_error", facts.sharing_error},
          {"cuda", facts.cuda_built},
          {"driver", facts.driver},
          {"driver_error", facts.driver_error},
          {"gpus", gpus},
          {"pairs", pairs}};
}

}  // namespace tandem::cli
