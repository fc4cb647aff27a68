// What `tandem up` says at last once the cluster serves: what it holds, where it is reached, what
// to type next. Pure.
#pragma once

#include <string>

#include "tandem/v1/admin.pb.h"

namespace tandem::cli {

struct ClusterPlaces {
  std::string address;   // the public API's
  std::string internal;  // for workers and operators
  std::string metrics;   // the router's
};

// Ends with a newline; no line is longer than `width` columns.
std::string SummaryText(const v1::GetClusterResponse& cluster, const ClusterPlaces& places,
                        int width);

// "2 prefill, 1 decode".
std::string RolesText(const v1::GetClusterResponse& cluster);

}  // namespace tandem::cli
