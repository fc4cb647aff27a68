#include "common/base/heap.h"

#include <cstdio>
#include <cstdlib>
#include <latch>
#include <malloc.h>
#include <string>
#include <thread>
#include <vector>

#include "gtest/gtest.h"

namespace tandem {
namespace {

// Once so many threads hold memory at once.
int HeapsOfThreads(int num_threads) {
  constexpr size_t kBytes = size_t{64} << 10;  // not of a thread's cache
  std::latch all(num_threads);
  std::vector<std::thread> threads;
  for (int i = 0; i < num_threads; ++i) {
    threads.emplace_back([&all] {
      const std::vector<char> piece(kBytes, 'x');
      all.arrive_and_wait();
    });
  }
  for (std::thread& thread : threads) thread.join();
  char* text = nullptr;
  size_t size = 0;
  std::FILE* file = open_memstream(&text, &size);
  malloc_info(0, file);
  std::fclose(file);
  const std::string info(text, size);
  std::free(text);
  int heaps = 0;
  for (size_t at = 0; (at = info.find("<heap nr=", at)) != std::string::npos; ++at) ++heaps;
  return heaps;
}

TEST(HeapDeathTest, ThreadsShareFewHeaps) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");  // in a process that has had no other threads
  EXPECT_EXIT(
      {
        unsetenv("MALLOC_ARENA_MAX");
        KeepFewHeaps();
        std::fprintf(stderr, "heaps: %d\n", HeapsOfThreads(32));
        std::exit(0);
      },
      testing::ExitedWithCode(0), "heaps: [1-4]\n");
}

}  // namespace
}  // namespace tandem
