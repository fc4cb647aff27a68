#include "tests/support/sanitizer.h"

#include <algorithm>
#include <cstdlib>

namespace tandem {

int64_t SanitizerKeepsMib() {
  const char* mib = std::getenv("TANDEM_SANITIZER_KEEPS_MIB");
  return mib != nullptr ? std::atoll(mib) : 0;
}

double SanitizerSlowsBy() {
  const char* times = std::getenv("TANDEM_SANITIZER_SLOWS_BY");
  return times != nullptr ? std::atof(times) : 1;
}

int SanitizerShare(int repetitions) {
  return std::max(1, static_cast<int>(repetitions / SanitizerSlowsBy()));
}

}  // namespace tandem
