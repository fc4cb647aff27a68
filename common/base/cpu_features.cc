#include "common/base/cpu_features.h"

namespace tandem {

bool CpuHasBF16() {
#if defined(__x86_64__)
  // Every CPU with AMX-BF16 has AVX512-BF16 too. The builtin also asks whether the operating system
  // saves the wide registers.
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
  return false;
#endif
}

}  // namespace tandem
