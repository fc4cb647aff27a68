// What a decode step costs the loop's thread in DecoderRunner's Launch and Collect, on a device
// that does nothing: the calls of CUDA itself come on top (a copy, a graph, a copy and an event).
//
//   step_bench [BATCH=64] [CONTEXT=2048] [STEPS=2000] [MODEL=tests/data/engine/qwen2-gqa]
//
// Times are of this thread alone, medians over steps: without and with penalties, which send each
// sequence's tokens to the device.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <time.h>
#include <utility>
#include <vector>

#include "bench/usage.h"
#include "common/base/check.h"
#include "common/base/locks.h"
#include "engine/device/cpu/cpu_device.h"
#include "engine/kernels/cpu/cpu_ops.h"
#include "engine/runtime/decoder_runner.h"

namespace tandem::engine {
namespace {

constexpr int kBlockSize = 16;

class NullEvent final : public Event {
 public:
  bool Ready() const override { return true; }
  bool WaitFor(absl::Duration) const override { return true; }
};

class NullStream final : public Stream {
 public:
  void CopyToDevice(void*, const void*, size_t) override {}
  void CopyToHost(void*, const void*, size_t) override {}
  void Record(Event*) override {}
  void Synchronize() override {}
  std::unique_ptr<Graph> Capture(const std::function<void()>&) override {
    return std::make_unique<Graph>();
  }
};

class NullDevice final : public Device {
 public:
  std::string Describe() const override { return "null"; }
  bool asynchronous() const override { return true; }
  bool shares_host_memory() const override { return false; }
  bool has_bfloat16() const override { return false; }
  size_t TotalMemory() const override { return cpu_.TotalMemory(); }
  size_t AvailableMemory() const override { return cpu_.AvailableMemory(); }
  absl::StatusOr<Buffer> Allocate(size_t bytes) override { return cpu_.Allocate(bytes); }
  absl::StatusOr<Buffer> AllocateKvPool(size_t bytes) override { return cpu_.Allocate(bytes); }
  absl::StatusOr<Buffer> AllocateStaging(size_t bytes) override { return cpu_.Allocate(bytes); }
  std::unique_ptr<Stream> NewStream() override { return std::make_unique<NullStream>(); }
  std::shared_ptr<Event> NewEvent() override { return std::make_shared<NullEvent>(); }
  Threads& threads() { return cpu_.threads(); }

 private:
  CpuDevice cpu_{{.num_threads = 1}};
};

double ThreadMicroseconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) * 1e6 + static_cast<double>(now.tv_nsec) / 1e3;
}

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

void Run(const char* name, DecoderRunner* runner, int batch, int context, int steps,
         const SamplingParams& sampling) {
  const int length = context + steps + 1, blocks_each = BlocksFor(length, kBlockSize);
  const std::vector<int32_t> tokens(static_cast<size_t>(length), 7);
  std::vector<int32_t> blocks(static_cast<size_t>(blocks_each));
  for (int i = 0; i < blocks_each; ++i) blocks[static_cast<size_t>(i)] = i;
  std::vector<double> launch, collect;
  StepId before = 0;
  for (int i = 0; i < steps; ++i) {
    Batch step;
    step.items.resize(static_cast<size_t>(batch));
    for (int j = 0; j < batch; ++j) {
      BatchItem& item = step.items[static_cast<size_t>(j)];
      item.start = context + i;
      item.num_tokens = 1;
      item.prompt_length = context;
      item.tokens = std::span(tokens).first(static_cast<size_t>(item.start + (before == 0)));
      if (before != 0) item.pending = {before, j};
      item.block_table = blocks;
      item.sampling = &sampling;
    }
    double start = ThreadMicroseconds();
    const auto launched = runner->Launch(step);
    launch.push_back(ThreadMicroseconds() - start);
    TANDEM_CHECK(launched.ok(), "{}", launched.status().ToString());
    if (before != 0) {
      start = ThreadMicroseconds();
      TANDEM_CHECK(runner->Collect(before).ok(), "no output");
      collect.push_back(ThreadMicroseconds() - start);
    }
    before = launched->id;
  }
  TANDEM_CHECK(runner->Collect(before).ok(), "no output");
  std::printf("%-20s batch %d, %d tokens: Launch %6.1f us, Collect %5.1f us\n", name, batch,
              context, Median(launch), Median(collect));
}

int Main(int batch, int context, int steps, const std::string& dir) {
  NullDevice device;
  const auto config = ModelConfig::Load(dir);
  TANDEM_CHECK(config.ok(), "{}", config.status().ToString());
  DecoderRunner::Options options;
  options.max_num_batched_tokens = 8192;
  options.max_num_seqs = std::max(256, batch);
  options.max_model_len = context + steps + 1;
  options.valid_vocab_size = 150;
  options.max_in_flight = 2;
  const DecoderLimits limits = DecoderRunner::LimitsOf(options);
  const OpsShape shape = OpsShapeOf(*config, Element::kFloat32, limits);
  CpuOps ops(shape, device.Allocate(CpuOps::ScratchBytes(shape)).value(), &device.threads());
  auto weights =
      LoadModelWeights(*config, {dir, false, 0, Element::kFloat32, 1}, &device, &ops).value();
  auto decoder = Decoder::Create(*config, std::move(weights), limits, &device, &ops).value();
  KvRegion kv;
  kv.layout = config->LayoutFor(kBlockSize, DType::kFloat32);
  kv.num_blocks = BlocksFor(options.max_model_len, kBlockSize) * batch;
  const Buffer pool = device.AllocateKvPool(kv.TotalBytes()).value();
  kv.base = pool.as<std::byte>();
  auto runner = DecoderRunner::Create(options, kv, &device, decoder.get(), &ops).value();
  runner->RecordDecodeSteps();
  SamplingParams sampling;
  sampling.temperature = 0;
  Run("greedy", runner.get(), batch, context, steps, sampling);
  sampling.temperature = 0.7f;
  sampling.repetition_penalty = 1.05f;
  Run("repetition penalty", runner.get(), batch, context, steps, sampling);
  return 0;
}

}  // namespace
}  // namespace tandem::engine

int main(int argc, char** argv) {
  tandem::WatchNoLockOrders();  // as the programs do
  if (tandem::AnswerHelp(argc, argv, "step_bench [BATCH] [CONTEXT] [STEPS] [MODEL_DIR]")) {
    return 0;
  }
  const auto number = [&](int i, int otherwise) {
    return argc > i ? std::atoi(argv[i]) : otherwise;
  };
  return tandem::engine::Main(number(1, 64), number(2, 2048), number(3, 2000),
                              argc > 4 ? argv[4] : "tests/data/engine/qwen2-gqa");
}
