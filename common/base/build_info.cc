#include "common/base/build_info.h"

#include "fmt/format.h"

#include "tandem_commit.h"  // written by cmake/commit.cmake

namespace tandem {

BuildInfo GetBuildInfo() {
  return {
    .version = TANDEM_VERSION, .commit = TANDEM_COMMIT, .type = TANDEM_BUILD_TYPE,
#if defined(__clang__)
    .compiler =
        fmt::format("clang {}.{}.{}", __clang_major__, __clang_minor__, __clang_patchlevel__),
#else
    .compiler = fmt::format("gcc {}.{}.{}", __GNUC__, __GNUC_MINOR__, __GNUC_PATCHLEVEL__),
#endif
    .cuda = TANDEM_HAS_CUDA != 0
  };
}

std::string VersionText(const std::string& program) {
  const BuildInfo info = GetBuildInfo();
  return fmt::format("{} {} (commit {}, {}, {})\n", program, info.version, info.commit, info.type,
                     info.compiler);
}

}  // namespace tandem
