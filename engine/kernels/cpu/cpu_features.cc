#include "engine/kernels/cpu_features.h"

namespace tandem {

bool CpuHasBF16() { return false; }

}  // namespace tandem
