// The flags of every process that say what it logs and how.
#pragma once

#include "common/base/log.h"
#include "common/config/flags.h"

namespace tandem {

void AddLogFlags(FlagSet* flags, LogOptions* options);

}  // namespace tandem
