// What the self-test of a link sends.
#pragma once

#include <cstddef>

#include "kvtransfer/transport/kv_connection.h"

namespace tandem::kvtransfer {

inline constexpr size_t kMaxProbePattern = size_t{1} << 20;

// kMaxProbePattern bytes in which no two stretches are alike; the same at every call. Thread-safe.
ConstBytes ProbePattern();

}  // namespace tandem::kvtransfer
