// A small fixed team of compute threads.
//
// Thread-safety: Run is called by one thread at a time (the worker loop that owns the model); it
// returns when every member has finished. Between calls the members spin for a few microseconds and
// then sleep in the kernel, so that several processes can share few cores.
#pragma once

#include <atomic>
#include <cstddef>
#include <functional>
#include <thread>
#include <vector>

namespace tandem::engine {

class Threads {
 public:
  // `count` members, the caller of Run included; >= 1.
  explicit Threads(int count);
  ~Threads();
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

  int count() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls body(member) once for every member in [0, count()).
  void Run(const std::function<void(int member)>& body);

  // Cuts [0, total) into contiguous ranges, at most one per member and each (but the last) of at
  // least `grain` elements, and calls body(begin, end) for each. Small totals run on the caller.
  void ForRanges(size_t total, size_t grain, const std::function<void(size_t, size_t)>& body);

  // Calls body(index, member) for every index in [0, total); members take indices one at a time, so
  // uneven work balances. `parallel` false: all on the caller.
  void ForEach(size_t total, bool parallel, const std::function<void(size_t, int)>& body);

 private:
  void WorkerMain(int member);

  const std::function<void(int)>* body_ = nullptr;  // set while running
  std::atomic<unsigned> generation_{0};             // grows by one per Run
  std::atomic<int> unfinished_{0};                  // workers still in the current Run
  bool stop_ = false;                               // published by generation_
  std::vector<std::thread> workers_;
};

// One per physical core that this process may use; hyper-threads are not counted.
int PhysicalCores();

}  // namespace tandem::engine
