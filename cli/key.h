// `tandem key`: makes API keys for the public API.
#pragma once

#include "cli/command.h"

namespace tandem::cli {

int RunKey(const Arguments& arguments);

}  // namespace tandem::cli
