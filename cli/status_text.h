// What `tandem status` shows of a cluster. Pure.
#pragma once

#include <cstddef>
#include <string>

#include "nlohmann/json.hpp"

#include "tandem/v1/admin.pb.h"

namespace tandem::cli {

struct StatusOptions {
  size_t width = 0;   // columns; columns of the table are left out to fit; 0: as wide as it gets
  bool wide = false;  // all there is, however wide
};

// `up`: what the `tandem up` that runs the cluster says is wanted (LocalCluster::Wanted in up.cc);
// null: not known.
std::string StatusText(const v1::GetClusterResponse& cluster, const nlohmann::json& up,
                       const StatusOptions& options);

}  // namespace tandem::cli
