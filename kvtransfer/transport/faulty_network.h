// A network that misbehaves on purpose, for tests: wraps another one and damages the frames that
// its connections send, in either direction. Bytes that travel beside the connection pass unharmed.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "kvtransfer/transport/kv_connection.h"

namespace tandem::kvtransfer {

enum class Fault {
  kNone,
  kDrop,            // the frame never leaves
  kDuplicate,       // it leaves twice
  kReorder,         // it leaves after the next frame (never, if there is none)
  kCorruptPayload,  // one bit of its payload flips; without payload, as kNone
  kCorruptHeader,   // it names another ordinal or layer; the checksum is right
  kDelay,           // it leaves late, and what follows with it
  kTruncate,        // half of it leaves, then the connection dies
  kKill,            // the connection dies instead
};

// Says what happens to a frame; `index` counts the frames sent through the network. Called from
// any thread, one call at a time.
using FaultScript = std::function<Fault(const FrameHeader& header, uint64_t index)>;

// `inner` must outlive what this returns, which must outlive its connections.
std::unique_ptr<KvNetwork> MakeFaultyNetwork(KvNetwork* inner, FaultScript script);

}  // namespace tandem::kvtransfer
