// What this program was built from and how; in a library of its own, so that a new commit links
// again only what says it.
#pragma once

#include <string>

namespace tandem {

struct BuildInfo {
  std::string version;   // "0.1.0"
  std::string commit;    // "0c06f7312ab4", with "-dirty" after changes; "unknown" outside git
  std::string type;      // "Release"
  std::string compiler;  // "gcc 12.2.0"
  bool cuda = false;     // has the CUDA engine
};
BuildInfo GetBuildInfo();

// "tandem_router 0.1.0 (commit 0c06f7312ab4, Release, gcc 12.2.0)\n"
std::string VersionText(const std::string& program);

}  // namespace tandem
