// A Qwen2 with a KV pool of its own, for tests that look at logits.
#pragma once

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "engine/model/qwen2.h"
#include "tests/support/paths.h"

namespace tandem::engine {

struct ModelUnderTest {
  std::unique_ptr<Threads> threads;
  std::unique_ptr<Qwen2> model;
  MemoryBlock pool;
  KvRegion kv;

  static absl::StatusOr<ModelUnderTest> Load(const std::string& dir, Element element,
                                             int num_threads, int block_size, int num_blocks,
                                             bool dummy = false) {
    ModelUnderTest test;
    test.threads = std::make_unique<Threads>(num_threads);
    absl::StatusOr<ModelConfig> config = ModelConfig::Load(dir);
    if (!config.ok()) return config.status();
    absl::StatusOr<ModelWeights> weights =
        LoadModelWeights(*config, {dir, dummy, 0, element}, test.threads.get());
    if (!weights.ok()) return weights.status();
    test.kv.layout = config->LayoutFor(
        block_size, element == Element::kFloat32 ? DType::kFloat32 : DType::kBFloat16);
    test.kv.num_blocks = num_blocks;
    test.pool = MemoryBlock(test.kv.TotalBytes());
    // Whatever nobody has written must never reach a result.
    std::fill_n(static_cast<unsigned char*>(test.pool.data()), test.pool.size(), 0xff);
    test.kv.base = static_cast<std::byte*>(test.pool.data());
    test.model = std::make_unique<Qwen2>(*config, *std::move(weights), 1024, test.threads.get());
    return test;
  }

  size_t vocab() const { return static_cast<size_t>(model->config().vocab_size); }

  // A piece of a sequence's tokens to compute.
  struct Chunk {
    const std::vector<int32_t>* tokens;
    int start;
    int count;
    const std::vector<int32_t>* blocks;
  };
  // Computes the chunks in one pass; the logits of every row, one after the other.
  std::vector<float> Run(const std::vector<Chunk>& chunks) {
    ForwardInput input;
    std::vector<int> rows;
    for (const Chunk& c : chunks) {
      input.items.push_back({input.tokens.size(), c.count, c.start, c.blocks->data()});
      for (int i = c.start; i < c.start + c.count; ++i) {
        rows.push_back(static_cast<int>(rows.size()));
        input.tokens.push_back((*c.tokens)[static_cast<size_t>(i)]);
        input.positions.push_back(i);
      }
    }
    model->Forward(input, kv, nullptr);
    std::vector<float> logits(rows.size() * vocab());
    model->Logits(rows, logits.data());
    return logits;
  }

  // Block ids 0..num_blocks in random order.
  std::vector<int32_t> ShuffledBlocks(std::mt19937* random) const {
    std::vector<int32_t> blocks(static_cast<size_t>(kv.num_blocks));
    std::iota(blocks.begin(), blocks.end(), 0);
    std::shuffle(blocks.begin(), blocks.end(), *random);
    return blocks;
  }
};

}  // namespace tandem::engine
