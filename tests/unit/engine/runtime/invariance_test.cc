// A sequence's logits do not depend on what else is in the batch, on chunk sizes, on the block size
// or on the number of threads: bit for bit in float32.
#include <cstring>
#include <random>

#include "fmt/format.h"
#include "gtest/gtest.h"

#include "common/base/cpu_features.h"
#include "tests/support/paths.h"
#include "tests/unit/engine/runtime/model_under_test.h"

namespace tandem::engine {
namespace {

constexpr int kSequencesAtOnce = 3;
constexpr int kPoolTokens = 1024;

std::vector<int32_t> RandomTokens(std::mt19937* random, size_t count, size_t vocab) {
  std::vector<int32_t> tokens(count);
  for (int32_t& token : tokens) token = static_cast<int32_t>((*random)() % vocab);
  return tokens;
}

// Each sequence's logits at every position, sequences computed together in random pieces.
std::vector<std::vector<float>> RunMixed(ModelUnderTest* test,
                                         const std::vector<std::vector<int32_t>>& sequences,
                                         std::mt19937* random) {
  const std::vector<int32_t> all = test->ShuffledBlocks(random);
  std::vector<std::vector<int32_t>> blocks(sequences.size());
  size_t next = 0;
  for (size_t s = 0; s < sequences.size(); ++s) {
    const size_t block_size = static_cast<size_t>(test->kv.layout.block_size);
    for (size_t have = 0; have < sequences[s].size(); have += block_size) {
      blocks[s].push_back(all.at(next++));
    }
  }
  std::vector<std::vector<float>> logits(sequences.size());
  std::vector<int> done(sequences.size());
  while (true) {
    std::vector<ModelUnderTest::Chunk> chunks;
    std::vector<size_t> owners;
    for (size_t s = 0; s < sequences.size(); ++s) {
      const int left = static_cast<int>(sequences[s].size()) - done[s];
      if (left == 0 || (*random)() % 4 == 0) continue;
      const int count = std::min(
          left, 1 + static_cast<int>((*random)() % 70) * static_cast<int>((*random)() % 2));
      chunks.push_back({&sequences[s], done[s], count, &blocks[s]});
      owners.push_back(s);
      done[s] += count;
    }
    if (chunks.empty()) {
      bool finished = true;
      for (size_t s = 0; s < sequences.size(); ++s) {
        finished &= done[s] == static_cast<int>(sequences[s].size());
      }
      if (finished) return logits;
      continue;
    }
    const std::vector<float> out = test->Run(chunks);
    size_t at = 0;
    for (size_t i = 0; i < chunks.size(); ++i) {
      const size_t floats = static_cast<size_t>(chunks[i].count) * test->vocab();
      logits[owners[i]].insert(logits[owners[i]].end(), out.begin() + static_cast<ptrdiff_t>(at),
                               out.begin() + static_cast<ptrdiff_t>(at + floats));
      at += floats;
    }
  }
}

void CheckModel(const std::string& dir, Element element, bool fp8_kv = false) {
  std::mt19937 random(11);
  std::vector<std::vector<int32_t>> sequences;
  std::vector<std::vector<float>> expected;
  {
    auto alone =
        ModelUnderTest::Load(dir, element, 1, 16, kPoolTokens / 16, false, "cpu", false, fp8_kv);
    ASSERT_OK(alone);
    const std::vector<int32_t> blocks = alone->ShuffledBlocks(&random);
    for (int s = 0; s < kSequencesAtOnce; ++s) {
      sequences.push_back(RandomTokens(&random, 1 + random() % 150, alone->vocab()));
      const int length = static_cast<int>(sequences.back().size());
      expected.push_back(alone->Run({{&sequences.back(), 0, length, &blocks}}));
    }
  }
  for (const int block_size : {16, 32, 64, 128, 256}) {
    for (const int threads : {1, 2}) {
      SCOPED_TRACE(fmt::format("block size {}, {} threads", block_size, threads));
      auto test = ModelUnderTest::Load(dir, element, threads, block_size, kPoolTokens / block_size,
                                       false, "cpu", false, fp8_kv);
      ASSERT_OK(test);
      const auto logits = RunMixed(&*test, sequences, &random);
      for (size_t s = 0; s < sequences.size(); ++s) {
        ASSERT_EQ(logits[s].size(), expected[s].size());
        ASSERT_EQ(
            std::memcmp(logits[s].data(), expected[s].data(), logits[s].size() * sizeof(float)), 0)
            << "sequence " << s;
      }
    }
  }
}

TEST(InvarianceTest, Fixtures) {
  for (const char* name : {"qwen2-gqa", "qwen2-yarn-tied", "qwen3-gqa", "llama-rope3"}) {
    SCOPED_TRACE(name);
    CheckModel(SourcePath(std::string("tests/data/engine/") + name), Element::kFloat32);
  }
}

// What is written to a page is what every later step reads, those of the same chunk too.
TEST(InvarianceTest, KvInFp8) {
  CheckModel(SourcePath("tests/data/engine/qwen2-gqa"), Element::kFloat32, /*fp8_kv=*/true);
}

// Who says which rows' logits it wants gets the same, though the last layer computes no others.
TEST(InvarianceTest, WantedRowsAlone) {
  constexpr int kTokens = 40;
  std::mt19937 random(12);
  auto test = ModelUnderTest::Load(SourcePath("tests/data/engine/qwen2-gqa"), Element::kFloat32, 1,
                                   16, kPoolTokens / 16);
  ASSERT_OK(test);
  const std::vector<int32_t> tokens = RandomTokens(&random, kTokens, test->vocab());
  const std::vector<int32_t> blocks = test->ShuffledBlocks(&random);
  const std::vector<float> all = test->Run({{&tokens, 0, kTokens, &blocks}});
  const std::vector<int32_t> wanted = {3, 17, kTokens - 1};
  const std::vector<float> some = test->Run({{&tokens, 0, kTokens, &blocks}}, wanted);
  ASSERT_EQ(some.size(), wanted.size() * test->vocab());
  for (size_t i = 0; i < wanted.size(); ++i) {
    const size_t row = static_cast<size_t>(wanted[i]);
    EXPECT_EQ(std::memcmp(&some[i * test->vocab()], &all[row * test->vocab()],
                          test->vocab() * sizeof(float)),
              0)
        << "row " << row;
  }
}

TEST(InvarianceTest, SharedModels) {
  TANDEM_REQUIRE_SHARED();
  for (const char* name : {"tiny-gqa7", "tiny-mha", "tiny-yarn"}) {
    SCOPED_TRACE(name);
    CheckModel(SharedDir() + "/reference/" + name, Element::kFloat32);
  }
}

TEST(InvarianceTest, BFloat16) {
  if (!CpuHasBF16()) GTEST_SKIP() << "this CPU has no bfloat16 arithmetic";
  CheckModel(SourcePath("tests/data/engine/qwen2-gqa"), Element::kBFloat16);
}

}  // namespace
}  // namespace tandem::engine
