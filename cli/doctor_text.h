// What `tandem doctor` says of links between workers and of a host. Pure.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "nlohmann/json.hpp"

#include "cli/host_facts.h"
#include "tandem/v1/admin.pb.h"

namespace tandem::cli {

inline constexpr size_t kDoctorWidth = 80;  // columns

// The links that the cluster's workers have made, and how many pairs have made none yet.
std::string LinksText(const v1::GetClusterResponse& cluster);
nlohmann::ordered_json LinksJson(const v1::GetClusterResponse& cluster);
// Every link carries blocks.
bool LinksWork(const v1::GetClusterResponse& cluster);

// How KV blocks travel between two pools of this host with --kv-transport=auto.
struct HostPair {
  std::string from;  // "host", "GPU 0"
  std::string to;
  std::string transport;
  std::string why;  // it is not a better one; empty: there is none
};
// Between two processes, so a pool's memory is paired with itself too.
std::vector<HostPair> PairsOf(const HostFacts& facts);

std::string HostText(const HostFacts& facts);
nlohmann::ordered_json HostJson(const HostFacts& facts);

}  // namespace tandem::cli
