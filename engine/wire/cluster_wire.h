// What a worker tells the router about itself and its prefix cache. Functions without state:
// thread-safe.
#pragma once

#include <string>

#include "absl/status/statusor.h"

#include "engine/kv/prefix_cache.h"
#include "engine/runtime/engine.h"
#include "tandem/internal/v1/cluster.pb.h"

namespace tandem::engine {

// Two workers may exchange KV and give the same tokens exactly when all fields agree.
internal::v1::Capability CapabilityOf(const Engine& engine, const std::string& served_model_name);

// `cleared`: the events are a snapshot that replaces all the router knew.
internal::v1::BlockEvents BlockEventsToProto(const BlockEvents& events, bool cleared);

}  // namespace tandem::engine
