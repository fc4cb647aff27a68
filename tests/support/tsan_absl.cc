// Makes absl::Mutex, and the counted references of absl::Status, of the system's abseil visible to
// the thread sanitizer. That library is built without it, so everything that they order would be
// reported as a race. These definitions stand before the library's, say what they do to the
// sanitizer, and call the library's.
//
// Linked into tests of -DTANDEM_SANITIZE=thread builds only.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <dlfcn.h>
#include <random>
#include <unistd.h>

#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "spdlog/spdlog.h"

extern "C" {
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
}

namespace {

// Unlocking, absl evaluates the conditions of waiting threads: reads that the lock still protects,
// but that come after our release.
class IgnoreReads {
 public:
  IgnoreReads() { AnnotateIgnoreReadsBegin(__FILE__, __LINE__); }
  ~IgnoreReads() { AnnotateIgnoreReadsEnd(__FILE__, __LINE__); }
};

// A shaken run: with TANDEM_SHAKE_US=N one in a hundred locks and unlocks comes up to N
// microseconds late, so that threads meet in orders that an undisturbed run shows once in
// thousands.
void Shake() {
  static const char* const most = std::getenv("TANDEM_SHAKE_US");
  static const int most_us = most != nullptr ? std::atoi(most) : 0;
  if (most_us <= 0) return;
  thread_local std::minstd_rand random(static_cast<uint32_t>(gettid()));
  if (random() % 100 == 0) usleep(random() % static_cast<uint32_t>(most_us) + 1);
}

template <typename Function>
Function* Real(const char* name) {
  void* found = dlsym(RTLD_NEXT, name);
  if (found == nullptr) {
    std::fprintf(stderr, "tsan_absl: abseil has no %s\n", name);
    std::abort();
  }
  return reinterpret_cast<Function*>(found);
}

// spdlog's library is built without the sanitizer too, and makes its registry when it is first
// used. Here that is before there is a second thread, so nothing has to order it.
[[maybe_unused]] const bool kRegistryIsMade = spdlog::default_logger_raw() != nullptr;

// Nor does the library's watch over the order of locks stand in the sanitizer's sight: a lock of
// its own, in no object of ours, orders what it keeps. It runs where the tests do without a
// sanitizer.
[[maybe_unused]] const bool kOrdersAreNotWatched =
    (absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore), true);

}  // namespace

// A member function is called with `this` as its first argument (Itanium C++ ABI).
#define TANDEM_REAL(Function, mangled) \
  using RealFunction = Function;       \
  static RealFunction* const real = Real<RealFunction>("_ZN4absl7debian3" mangled)

namespace absl {
ABSL_NAMESPACE_BEGIN

void Mutex::Lock() {
  TANDEM_REAL(void(Mutex*), "5Mutex4LockEv");
  Shake();
  {
    IgnoreReads ignore;
    real(this);
  }
  __tsan_acquire(this);
}

bool Mutex::TryLock() {
  TANDEM_REAL(bool(Mutex*), "5Mutex7TryLockEv");
  const bool locked = real(this);
  if (locked) __tsan_acquire(this);
  return locked;
}

void Mutex::Unlock() {
  TANDEM_REAL(void(Mutex*), "5Mutex6UnlockEv");
  __tsan_release(this);
  {
    IgnoreReads ignore;
    real(this);
  }
  Shake();
}

void Mutex::ReaderLock() { Lock(); }
void Mutex::ReaderUnlock() { Unlock(); }

void Mutex::LockWhen(const Condition& condition) {
  Lock();
  Await(condition);
}

void Mutex::Await(const Condition& condition) {
  TANDEM_REAL(void(Mutex*, const Condition&), "5Mutex5AwaitERKNS0_9ConditionE");
  __tsan_release(this);
  {
    IgnoreReads ignore;
    real(this, condition);
  }
  __tsan_acquire(this);
}

bool Mutex::AwaitWithTimeout(const Condition& condition, Duration timeout) {
  TANDEM_REAL(bool(Mutex*, const Condition&, Duration),
              "5Mutex16AwaitWithTimeoutERKNS0_9ConditionENS0_8DurationE");
  __tsan_release(this);
  bool result = false;
  {
    IgnoreReads ignore;
    result = real(this, condition, timeout);
  }
  __tsan_acquire(this);
  return result;
}

bool Mutex::AwaitWithDeadline(const Condition& condition, Time deadline) {
  TANDEM_REAL(bool(Mutex*, const Condition&, Time),
              "5Mutex17AwaitWithDeadlineERKNS0_9ConditionENS0_4TimeE");
  __tsan_release(this);
  bool result = false;
  {
    IgnoreReads ignore;
    result = real(this, condition, deadline);
  }
  __tsan_acquire(this);
  return result;
}

// The last reference frees what all had. Whoever gives one up has read it before.
void Status::UnrefNonInlined(uintptr_t rep) {
  TANDEM_REAL(void(uintptr_t), "6Status15UnrefNonInlinedEm");
  __tsan_release(reinterpret_cast<void*>(rep));
  __tsan_acquire(reinterpret_cast<void*>(rep));
  real(rep);
}

ABSL_NAMESPACE_END
}  // namespace absl
