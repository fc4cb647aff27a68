// Parties of a cluster, for tests.
#pragma once

#include <memory>
#include <string>
#include <utility>

#include "common/base/check.h"
#include "common/base/status.h"
#include "common/rpc/cluster_credentials.h"

namespace tandem {

inline std::shared_ptr<const ClusterCredentials> TestCredentials(
    const std::string& role, const std::string& id, const std::string& secret = "",
    std::shared_ptr<CertificateFiles> certificate = nullptr) {
  auto credentials = ClusterCredentials::Make(secret, {role, id}, std::move(certificate));
  TANDEM_CHECK(credentials.ok(), "{}", MessageOf(credentials.status()));
  return *std::move(credentials);
}

}  // namespace tandem
