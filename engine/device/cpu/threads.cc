#include "engine/device/cpu/threads.h"

#include <algorithm>
#include <fstream>
#include <sched.h>
#include <set>
#include <string>
#include <utility>

namespace tandem::engine {
namespace {

// About 10 microseconds: longer than the gap between two kernels of a layer, far shorter than a
// scheduler's time slice.
constexpr int kSpins = 400;

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

template <typename T>
void WaitWhileEqual(std::atomic<T>& value, T old) {
  for (int i = 0; i < kSpins; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    Pause();
  }
  value.wait(old, std::memory_order_acquire);
}

}  // namespace

Threads::Threads(int count) {
  workers_.reserve(std::max(count, 1) - 1);
  for (int member = 1; member < count; ++member) {
    workers_.emplace_back([this, member] { WorkerMain(member); });
  }
}

Threads::~Threads() {
  stop_ = true;
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void Threads::WorkerMain(int member) {
  unsigned seen = 0;
  while (true) {
    WaitWhileEqual(generation_, seen);
    ++seen;
    if (stop_) return;
    (*body_)(member);
    if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) unfinished_.notify_one();
  }
}

void Threads::Run(const std::function<void(int)>& body) {
  if (workers_.empty()) return body(0);
  body_ = &body;
  unfinished_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  body(0);
  for (int left = unfinished_.load(std::memory_order_acquire); left != 0;
       left = unfinished_.load(std::memory_order_acquire)) {
    WaitWhileEqual(unfinished_, left);
  }
  body_ = nullptr;
}

void Threads::ForRanges(size_t total, size_t grain,
                        const std::function<void(size_t, size_t)>& body) {
  if (total == 0) return;
  const size_t parts =
      std::clamp<size_t>(total / std::max<size_t>(grain, 1), 1, static_cast<size_t>(count()));
  if (parts == 1) return body(0, total);
  Run([&](int member) {
    const size_t m = static_cast<size_t>(member);
    if (m >= parts) return;
    const size_t begin = total * m / parts, end = total * (m + 1) / parts;
    if (begin < end) body(begin, end);
  });
}

void Threads::ForEach(size_t total, bool parallel, const std::function<void(size_t, int)>& body) {
  if (!parallel || total < 2) {
    for (size_t i = 0; i < total; ++i) body(i, 0);
    return;
  }
  std::atomic<size_t> next{0};
  Run([&](int member) {
    for (size_t i = next.fetch_add(1); i < total; i = next.fetch_add(1)) body(i, member);
  });
}

int PhysicalCores() {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) {
    return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  }
  std::set<std::string> cores;  // each named by its list of sibling hyper-threads
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed)) continue;
    std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(cpu) +
                       "/topology/thread_siblings_list");
    std::string siblings;
    if (!std::getline(file, siblings)) siblings = "cpu" + std::to_string(cpu);
    cores.insert(siblings);
  }
  return std::max<int>(1, static_cast<int>(cores.size()));
}

}  // namespace tandem::engine
