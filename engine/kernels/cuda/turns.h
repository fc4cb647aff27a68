// Whose turn it is to fetch. A kernel that starts beside its predecessor (LaunchOptions::overlap)
// could fill its rings at once, but that only takes bandwidth from the predecessor, and between the
// two memory idles. So a thread block waits until the one before it on its multiprocessor has
// called for the last of its data, and fetches while that one ends. A turn is a hint: no result
// depends on it.
#pragma once

#include <cstdint>

namespace tandem::engine::cuda {

// By multiprocessors' numbers: 1 while a thread block there has something to call for. Zeros at
// first and after every kernel; one array for all kernels of a stream.
inline constexpr int kTurns = 256;

}  // namespace tandem::engine::cuda
