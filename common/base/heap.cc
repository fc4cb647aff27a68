#include "common/base/heap.h"

#include <cstdlib>
#include <malloc.h>

namespace tandem {

void KeepFewHeaps() {
#ifdef M_ARENA_MAX  // glibc
  constexpr int kHeaps = 4;
  if (std::getenv("MALLOC_ARENA_MAX") == nullptr) mallopt(M_ARENA_MAX, kHeaps);
#endif
}

}  // namespace tandem
