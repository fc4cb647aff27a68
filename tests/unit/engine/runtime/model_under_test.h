// A decoder with a KV pool of its own, for tests that look at logits.
#pragma once

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "common/base/status.h"
#include "engine/model/decoder.h"
#include "engine/runtime/backend.h"
#include "tests/support/paths.h"

namespace tandem::engine {

struct ModelUnderTest {
  static constexpr int kMaxRows = 1024;

  std::unique_ptr<Backend> backend;
  std::unique_ptr<Ops> ops;
  std::unique_ptr<Decoder> decoder;
  std::unique_ptr<Stream> stream;
  Buffer pool;
  KvRegion kv;

  static absl::StatusOr<ModelUnderTest> Load(const std::string& dir, Element element,
                                             int num_threads, int block_size, int num_blocks,
                                             bool dummy = false,
                                             const std::string& device_name = "cpu",
                                             bool batch_invariant = false, bool fp8_kv = false) {
    const DecoderLimits limits{kMaxRows, kMaxRows, kMaxRows};
    ModelUnderTest test;
    TANDEM_ASSIGN_OR_RETURN(test.backend, OpenBackend(device_name, {.num_threads = num_threads}));
    Device& device = test.backend->device();
    test.stream = device.NewStream();
    TANDEM_ASSIGN_OR_RETURN(const ModelConfig config, ModelConfig::Load(dir));
    OpsShape shape = OpsShapeOf(config, element, limits);
    shape.batch_invariant = batch_invariant;
    shape.fp8_kv = fp8_kv;
    TANDEM_ASSIGN_OR_RETURN(test.ops, test.backend->MakeOps(shape));
    TANDEM_ASSIGN_OR_RETURN(
        ModelWeights weights,
        LoadModelWeights(config, {dir, dummy, 0, element, num_threads}, &device, test.ops.get()));
    const DType own = element == Element::kFloat32 ? DType::kFloat32 : DType::kBFloat16;
    test.kv.layout = config.LayoutFor(block_size, fp8_kv ? DType::kFloat8E4M3 : own);
    test.kv.num_blocks = num_blocks;
    TANDEM_ASSIGN_OR_RETURN(test.pool, device.AllocateKvPool(test.kv.TotalBytes()));
    // Whatever nobody has written must never reach a result.
    const std::vector<unsigned char> poison(test.pool.size(), 0xff);
    test.stream->CopyToDevice(test.pool.data(), poison.data(), poison.size());
    test.stream->Synchronize();
    test.kv.base = test.pool.as<std::byte>();
    TANDEM_ASSIGN_OR_RETURN(
        test.decoder, Decoder::Create(config, std::move(weights), limits, &device, test.ops.get()));
    return test;
  }

  size_t vocab() const { return static_cast<size_t>(decoder->config().vocab_size); }

  // A piece of a sequence's tokens to compute.
  struct Chunk {
    const std::vector<int32_t>* tokens;
    int start;
    int count;
    const std::vector<int32_t>* blocks;
  };
  // Computes the chunks in one pass; the logits of every row, one after the other, or of those that
  // are wanted.
  std::vector<float> Run(const std::vector<Chunk>& chunks,
                         const std::vector<int32_t>& wanted = {}) {
    std::vector<int32_t> ids, positions, first_rows = {0}, starts, first_blocks = {0}, blocks, rows;
    for (const Chunk& c : chunks) {
      for (int i = c.start; i < c.start + c.count; ++i) {
        rows.push_back(static_cast<int32_t>(rows.size()));
        ids.push_back((*c.tokens)[static_cast<size_t>(i)]);
        positions.push_back(i);
      }
      starts.push_back(c.start);
      blocks.insert(blocks.end(), c.blocks->begin(), c.blocks->end());
      first_rows.push_back(static_cast<int32_t>(rows.size()));
      first_blocks.push_back(static_cast<int32_t>(blocks.size()));
    }
    RaggedBatch batch;
    batch.num_rows = static_cast<int>(rows.size());
    batch.num_items = static_cast<int>(chunks.size());
    for (const Chunk& c : chunks) {
      batch.max_item_rows = std::max(batch.max_item_rows, c.count);
      batch.max_length = std::max(batch.max_length, c.start + c.count);
    }
    batch.token_ids = ids.data();
    batch.positions = positions.data();
    batch.first_rows = first_rows.data();
    batch.starts = starts.data();
    batch.first_blocks = first_blocks.data();
    batch.blocks = blocks.data();
    RaggedBatch device_batch = batch;
    std::vector<Buffer> copies;
    device_batch.token_ids = Copy(ids, &copies);
    device_batch.positions = Copy(positions, &copies);
    device_batch.first_rows = Copy(first_rows, &copies);
    device_batch.starts = Copy(starts, &copies);
    device_batch.first_blocks = Copy(first_blocks, &copies);
    device_batch.blocks = Copy(blocks, &copies);
    if (!wanted.empty()) rows = wanted;
    const int32_t* device_rows = Copy(rows, &copies);
    const int count = static_cast<int>(rows.size());
    ForwardInput input{.batch = &device_batch, .host = &batch};
    if (!wanted.empty()) {
      input.wanted = device_rows;
      input.num_wanted = count;
    }
    decoder->Forward(input, kv, stream.get());
    std::vector<float> logits(rows.size() * vocab());
    const float* device_logits = Copy(logits, &copies);
    decoder->Logits(device_rows, count, const_cast<float*>(device_logits), stream.get());
    stream->CopyToHost(logits.data(), device_logits, logits.size() * sizeof(float));
    stream->Synchronize();
    return logits;
  }
  // A copy in memory of the device.
  template <typename T>
  const T* Copy(const std::vector<T>& values, std::vector<Buffer>* copies) {
    const size_t bytes = values.size() * sizeof(T);
    copies->push_back(backend->device().Allocate(std::max<size_t>(bytes, 64)).value());
    stream->CopyToDevice(copies->back().data(), values.data(), bytes);
    stream->Synchronize();
    return copies->back().as<T>();
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
