// A backend that behaves as a GPU's does, on the CPU: the host returns from every call before the
// work is done, and memory of the device is not the host's. What only a GPU would show of a mistake
// in the order of copies, ops and events shows here.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/time/time.h"

#include "engine/runtime/backend.h"

namespace tandem::engine {

// `delay` is called before each piece of a stream's work, on the stream's thread. Ops are the
// CPU's. Staging buffers and device memory are distinct; host memory that a copy or an op names is
// read when the work is done, not when it is given.
std::unique_ptr<Backend> MakeDeferredBackend(std::function<absl::Duration()> delay);

}  // namespace tandem::engine
