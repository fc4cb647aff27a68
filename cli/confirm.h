// A question before something that may hurt.
#pragma once

#include <string>

namespace tandem::cli {

// True if `force`, or if somebody at a terminal answers yes to "WARNING. Go on? [y/N]". Says what
// to do instead where it returns false.
bool Confirm(const std::string& command, const std::string& warning, bool force);

}  // namespace tandem::cli
