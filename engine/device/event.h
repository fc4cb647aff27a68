// A point in a stream's work.
#pragma once

#include "common/base/ready_event.h"

namespace tandem::engine {

// Made by Device::NewEvent, false until Stream::Record has been called and what the stream was
// given before is done. Thread-safe, as every ReadyEvent.
class Event : public ReadyEvent {};

}  // namespace tandem::engine
