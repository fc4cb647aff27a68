// What the CPU can do.
#pragma once

namespace tandem {

// AVX512-BF16 or AMX-BF16, and an operating system that saves its registers.
bool CpuHasBF16();

}  // namespace tandem
