// What the decode worker tells the router about itself, as messages. Functions without state.
#pragma once

#include "decode_worker/load_meter.h"
#include "tandem/internal/v1/cluster.pb.h"

namespace tandem::decode {

internal::v1::LoadReport LoadToProto(const LoadSnapshot& load);

}  // namespace tandem::decode
