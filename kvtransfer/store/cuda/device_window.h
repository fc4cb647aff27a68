// The host's memory as a window onto a pool in a card's memory (HostWindow).
#pragma once

#include <cstddef>
#include <memory>
#include <span>

#include "absl/status/statusor.h"

#include "common/base/kv_layout.h"
#include "kvtransfer/store/host_window.h"

namespace tandem::kvtransfer::cuda {

// `region` lies in the memory of `device` and outlives the window, as `window` does.
absl::StatusOr<std::unique_ptr<HostWindow>> OpenDeviceWindow(const KvRegion& region, int device,
                                                             std::span<std::byte> window,
                                                             size_t max_copy_bytes);

// The NUMA node of the host that the card hangs on; -1: not known.
int NodeOfCard(int device);

}  // namespace tandem::kvtransfer::cuda
