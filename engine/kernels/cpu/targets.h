// Which instruction sets the Highway kernels are compiled for: the baseline of x86-64, AVX2 with
// FMA, and AVX-512. The variants in between would only cost compile time. Include before any
// Highway header.
#pragma once

#ifndef HWY_DISABLED_TARGETS
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4 | HWY_AVX3_DL)
#endif
