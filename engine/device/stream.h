// An in-order queue of work on a device: what ops are given to run on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

namespace tandem::engine {

class Event;

// Work that a stream has recorded, to be given to it again as one piece.
class Graph {
 public:
  virtual ~Graph() = default;
};

// Not thread-safe: one thread gives work to a stream.
//
// Work is done in the order in which it was given. On an asynchronous device (Device::asynchronous)
// every call may return before its work is done, and the memory that it names must stay as it is
// until then. On other devices every call does its work before it returns.
class Stream {
 public:
  // What was given must be done: see Synchronize.
  virtual ~Stream() = default;

  // What follows belongs to this step of the model: errors name it.
  virtual void BeginStep(int64_t) {}

  // Between memory of the host and memory of the device. The host does not wait where its memory is
  // Device::AllocateStaging's.
  virtual void CopyToDevice(void* to, const void* from, size_t bytes) = 0;
  virtual void CopyToHost(void* to, const void* from, size_t bytes) = 0;
  // Makes `event` true once everything given before is done. An event is recorded once.
  virtual void Record(Event* event) = 0;
  // Records what `work` gives to this stream, instead of doing it: addresses and arguments stay as
  // they are, what lies at the addresses is read when the graph runs. No events, and no copies but
  // between memory of the device. Null, and `work` is not called, where the device has no graphs.
  virtual std::unique_ptr<Graph> Capture(const std::function<void()>& /*work*/) { return nullptr; }
  // Gives the stream the work of a graph that it recorded. The graph outlives it.
  virtual void Launch(Graph* /*graph*/) {}
  // Waits until everything is done.
  virtual void Synchronize() = 0;
};

}  // namespace tandem::engine
