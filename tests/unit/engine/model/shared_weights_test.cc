// One copy of packed weights for several workers: it is the copy that each would have made, and
// what is unfinished, changed or another's is never used.
#include "engine/model/shared_weights.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <fcntl.h>
#include <fstream>
#include <string>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>
#include <vector>

#include "absl/synchronization/notification.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "engine/device/cpu/cpu_device.h"
#include "engine/kernels/cpu/cpu_ops.h"
#include "engine/model/model_weights.h"
#include "tests/support/paths.h"
#include "tests/support/same_weights.h"

namespace tandem::engine {
namespace {

// As `tandem up` makes it.
class Memfd {
 public:
  Memfd() : fd_(memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING)) {}
  ~Memfd() { close(fd_); }
  int fd() const { return fd_; }
  std::string path() const {
    return "/proc/" + std::to_string(getpid()) + "/fd/" + std::to_string(fd_);
  }
  bool sealed() const { return (fcntl(fd_, F_GET_SEALS) & F_SEAL_WRITE) != 0; }
  std::string Content() const {
    std::ifstream file(path(), std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  void Write(const std::string& content) const {
    ASSERT_EQ(pwrite(fd_, content.data(), content.size(), 0), static_cast<ssize_t>(content.size()));
  }
  void Seal() const {
    ASSERT_EQ(fcntl(fd_, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL), 0);
  }

 private:
  const int fd_;
};

class SharedWeightsTest : public testing::Test {
 protected:
  absl::StatusOr<ModelWeights> Load(const std::string& shared,
                                    const std::string& name = "qwen2-gqa", bool dummy = false,
                                    Element element = Element::kFloat32, bool fp8 = false) {
    const std::string dir = SourcePath("tests/data/engine/" + name);
    LoadOptions options;
    options.model_dir = dir;
    options.dummy = dummy;
    options.element = element;
    options.num_threads = 2;
    options.shared_memory = shared;
    options.fp8 = fp8;
    OpsShape shape;
    shape.element = element;
    CpuOps ops(shape, Buffer(), &device_.threads());  // only packs
    return LoadModelWeights(ModelConfig::Load(dir).value(), options, &device_, &ops);
  }

  // Whether the memory at `address` belongs to a memfd, and may not be written.
  static bool IsReadOnlyMemfd(const void* address) {
    std::ifstream maps("/proc/self/maps");
    for (std::string line; std::getline(maps, line);) {
      unsigned long begin = 0, end = 0;
      char rights[5] = {};
      if (std::sscanf(line.c_str(), "%lx-%lx %4s", &begin, &end, rights) != 3) continue;
      const auto at = reinterpret_cast<unsigned long>(address);
      if (at < begin || at >= end) continue;
      return std::string(rights).substr(0, 2) == "r-" && line.find("memfd:") != line.npos;
    }
    return false;
  }

  CpuDevice device_{{.num_threads = 2}};
};

TEST_F(SharedWeightsTest, AreTheWeightsThatEachWouldHaveLoaded) {
  for (const std::string name : {"llama-biases", "qwen2-yarn-tied", "qwen3-gqa"}) {
    for (const bool dummy : {false, true}) {
      for (const Element element : {Element::kFloat32, Element::kBFloat16}) {
        SCOPED_TRACE(name);
        const Memfd memory;
        const auto own = Load("", name, dummy, element);
        const auto first = Load(memory.path(), name, dummy, element);
        const size_t size = SharedWeightsSize(memory.path());
        const auto second = Load(memory.path(), name, dummy, element);
        ASSERT_OK(own);
        ASSERT_OK(first);
        ASSERT_OK(second);
        ExpectSame(*first, *own);
        ExpectSame(*second, *own);
        EXPECT_GE(size, own->PackedBytes());
        EXPECT_EQ(SharedWeightsSize(memory.path()), size);
        for (const auto* weights : {&*first, &*second}) {
          EXPECT_TRUE(IsReadOnlyMemfd(weights->layers[1].down.memory.data()));
          EXPECT_TRUE(IsReadOnlyMemfd(weights->final_norm.memory.data()));
          EXPECT_TRUE(IsReadOnlyMemfd(weights->head.matrix.data));
          EXPECT_EQ(IsReadOnlyMemfd(weights->embedding_data()), dummy);
        }
      }
    }
  }
}

TEST_F(SharedWeightsTest, NobodyCanChangeThem) {
  const Memfd memory;
  const auto weights = Load(memory.path());
  ASSERT_OK(weights);
  EXPECT_TRUE(memory.sealed());
  EXPECT_EQ(pwrite(memory.fd(), "x", 1, 5000), -1);
  EXPECT_EQ(ftruncate(memory.fd(), 0), -1);
  EXPECT_EQ(mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, memory.fd(), 0), MAP_FAILED);
}

TEST_F(SharedWeightsTest, WhatIsNotFinishedIsFilledAnew) {
  const Memfd finished;
  ASSERT_OK(Load(finished.path()));
  const Memfd torn;
  std::string content = finished.Content();
  content.resize(content.size() / 2);
  std::fill(content.begin() + 4096, content.end(), 'x');
  torn.Write(content);
  const auto own = Load(""), weights = Load(torn.path());
  ASSERT_OK(weights);
  ExpectSame(*weights, *own);
  EXPECT_TRUE(torn.sealed());
  EXPECT_TRUE(IsReadOnlyMemfd(weights->layers[0].down.memory.data()));
}

TEST_F(SharedWeightsTest, WhoDiesFillingThemLeavesThemToTheNext) {
  const Memfd memory;
  const std::string path = memory.path();  // of this process
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    const auto die = [](WeightArena* arena) {
      auto part = arena->Take("part", 10'000);
      if (part.ok()) std::memset(part->data(), 'x', part->size());
      _exit(part.ok() ? 7 : 8);
      return absl::OkStatus();
    };
    (void)UseSharedWeights(path, "key", die, die);
    _exit(9);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_EQ(WEXITSTATUS(status), 7);
  EXPECT_FALSE(memory.sealed());
  EXPECT_GT(SharedWeightsSize(path), 0u);
  const auto own = Load(""), weights = Load(path);
  ASSERT_OK(weights);
  ExpectSame(*weights, *own);
  EXPECT_TRUE(memory.sealed());
}

// Another checkpoint, another dtype, weights that are not rounded, changed bytes, no weights at
// all: sealed, so that they can not be filled anew. The worker has its own.
TEST_F(SharedWeightsTest, WhatHoldsSomethingElseIsNotUsed) {
  const auto expect_own = [&](const std::string& path, Element element = Element::kFloat32,
                              bool fp8 = false) {
    const auto own = Load("", "qwen2-gqa", false, element, fp8);
    const auto weights = Load(path, "qwen2-gqa", false, element, fp8);
    ASSERT_OK(weights);
    ExpectSame(*weights, *own);
    EXPECT_FALSE(IsReadOnlyMemfd(weights->layers[0].down.memory.data()));
  };
  const Memfd other_model;
  ASSERT_OK(Load(other_model.path(), "qwen3-gqa"));
  expect_own(other_model.path());
  const Memfd finished;
  ASSERT_OK(Load(finished.path()));
  expect_own(finished.path(), Element::kBFloat16);
  expect_own(finished.path(), Element::kFloat32, true);
  for (const size_t at : {size_t{0}, size_t{4096}, finished.Content().size() - 1}) {
    const Memfd changed;
    std::string content = finished.Content();
    content[at] = static_cast<char>(content[at] ^ 1);
    changed.Write(content);
    changed.Seal();
    expect_own(changed.path());
  }
  const Memfd empty;
  empty.Seal();
  expect_own(empty.path());
  const std::string plain = testing::TempDir() + "shared_weights_test_plain";
  std::ofstream(plain) << "text";
  expect_own(plain);
  expect_own("/nonexistent");
}

TEST_F(SharedWeightsTest, AnErrorOfTheCheckpointStaysAnError) {
  const Memfd memory;
  const auto broken = [](WeightArena*) { return absl::InvalidArgumentError("no such tensor"); };
  EXPECT_EQ(UseSharedWeights(memory.path(), "key", broken, broken),
            absl::InvalidArgumentError("no such tensor"));
  EXPECT_FALSE(memory.sealed());
}

// Parts that are asked for in another order than they were written are another release's.
TEST_F(SharedWeightsTest, PartsAreComparedByNameAndSize) {
  const Memfd memory;
  const auto take = [](std::vector<std::string> names) {
    return [names](WeightArena* arena) {
      for (const std::string& name : names) {
        if (const auto part = arena->Take(name, 100); !part.ok()) return part.status();
      }
      return absl::OkStatus();
    };
  };
  EXPECT_OK(UseSharedWeights(memory.path(), "key", take({"a", "b"}), take({"a", "b"})));
  for (const auto& names :
       std::vector<std::vector<std::string>>{{"b", "a"}, {"a"}, {"a", "b", "c"}}) {
    const absl::Status status = UseSharedWeights(memory.path(), "key", take(names), take(names));
    EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
  }
}

TEST_F(SharedWeightsTest, OneFillsAndTheOthersWait) {
  const Memfd memory;
  std::atomic<int> fills = 0, uses = 0;
  absl::Notification filling, go_on;
  const auto fill = [&](WeightArena* arena) {
    ++fills;
    filling.Notify();
    go_on.WaitForNotification();
    return arena->Take("part", 100).status();
  };
  const auto use = [&](WeightArena* arena) {
    ++uses;
    return arena->Take("part", 100).status();
  };
  std::vector<std::thread> threads;
  threads.emplace_back([&] { EXPECT_OK(UseSharedWeights(memory.path(), "key", fill, use)); });
  filling.WaitForNotification();
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([&] { EXPECT_OK(UseSharedWeights(memory.path(), "key", fill, use)); });
  }
  EXPECT_EQ(uses, 0);
  go_on.Notify();
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(fills, 1);
  EXPECT_EQ(uses, 4);
}

}  // namespace
}  // namespace tandem::engine
