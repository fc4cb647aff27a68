// How fast the engine is, beside what the machine could do at the same moment: read bandwidth
// is the floor of a decode step, multiply-add throughput that of prefill.
//
// engine_bench [--dtype float32|bfloat16] [--kv-cache-dtype auto|fp8] [--threads N] [--layers N]
//              [--prefill 128,512,2048] [--decode 1,4,16,64] [--context 256] [--repeats N]
//              [--json FILE]
// engine_bench --device cuda [--json FILE] [--rows PART] [--seconds N] [--batch-invariant true]
//                           [--pad-query-heads true]
//
// On the CPU: dummy weights in the shape of Qwen2.5-0.5B; with fewer layers the figures scale to
// the whole model only roughly. --prefill: lengths, --decode: batch sizes, --context: cached tokens
// of each decode row, --repeats: the best of so many counts; --json: the medians, for `tandem plan
// --bench`. On a GPU: see gpu_suite.h.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <sstream>
#include <string>
#include <vector>

#include "fmt/format.h"
#include "nlohmann/json.hpp"

#ifdef TANDEM_CUDA
#include "bench/gpu_suite.h"
#endif
#include "bench/usage.h"
#include "common/base/cpu_features.h"
#include "common/base/locks.h"
#include "engine/kernels/cpu/linear.h"
#include "engine/model/mapped_file.h"
#include "engine/runtime/engine.h"

namespace tandem::engine {
namespace {

double Seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

template <typename F>
double BestOf(int times, const F& work) {
  double best = 1e30;
  for (int i = 0; i < times; ++i) {
    const double start = Seconds();
    work();
    best = std::min(best, Seconds() - start);
  }
  return best;
}

// Bytes per second of reading memory far larger than any cache.
double ReadBandwidth(Threads* threads) {
  const size_t words = size_t{96} << 20;  // 768 MB
  static MemoryBlock block(words * 8);
  uint64_t* data = static_cast<uint64_t*>(block.data());
  std::fill_n(data, words, 1);
  std::vector<uint64_t> sums(static_cast<size_t>(threads->count()) * 8);
  const double seconds = BestOf(4, [&] {
    threads->Run([&](int member) {
      const size_t m = static_cast<size_t>(member), n = static_cast<size_t>(threads->count());
      uint64_t sum[8] = {};
      for (size_t i = words * m / n / 8 * 8; i + 8 <= words * (m + 1) / n; i += 8) {
        for (size_t j = 0; j < 8; ++j) sum[j] += data[i + j];
      }
      sums[m * 8] = std::accumulate(sum, sum + 8, uint64_t{0});
    });
  });
  return static_cast<double>(words * 8) / seconds;
}

// Multiply-adds per second, twice, of the matrix product itself on data that fits the second-level
// cache: the most that any product here could reach.
double PeakFlops(Element element, Threads* threads) {
  const size_t k = 256, n = 2 * kPanel, rows = 192;
  Threads alone(1);
  std::vector<float> source(n * k, 0.5f), x(rows * k, 0.25f);
  MemoryBlock packed(PackedBytes(element, n, k));
  PackRows(source.data(), Element::kFloat32, n, k, 0, element, packed.data(), &alone);
  const PackedMatrix w{element, n, k, packed.data()};
  const int repeats = 150;
  const double seconds = BestOf(3, [&] {
    threads->Run([&](int) {
      Threads self(1);
      std::vector<float> y(rows * n);
      MemoryBlock scratch(std::max<size_t>(64, LinearScratchBytes(element, rows, k)));
      for (int i = 0; i < repeats; ++i) {
        Linear(w, nullptr, x.data(), k, rows, y.data(), n, scratch.data(), &self);
      }
    });
  });
  return 2.0 * static_cast<double>(n * k * rows) * repeats * threads->count() / seconds;
}

std::string ConfigJson(int layers) {
  return fmt::format(
      R"({{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 896,
 "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2,
 "num_hidden_layers": {}, "vocab_size": 151936, "max_position_embeddings": 32768,
 "rope_theta": 1000000.0, "rms_norm_eps": 1e-06, "tie_word_embeddings": true,
 "torch_dtype": "bfloat16"}})",
      layers);
}

std::string WriteConfig(int layers) {
  const std::filesystem::path dir = std::filesystem::temp_directory_path() / "tandem_engine_bench";
  std::filesystem::create_directories(dir);
  std::ofstream(dir / "config.json") << ConfigJson(layers);
  return dir.string();
}

struct Times {
  double best = 0;
  double median = 0;
};

// One sequence over blocks [first_block, ...): computes `count` tokens from `start`.
Times RunSeconds(Engine* engine, int sequences, int start, int count, int times) {
  const int block_size = engine->options().block_size;
  const int blocks = (start + count + block_size - 1) / block_size;
  std::vector<int32_t> tokens(static_cast<size_t>(start + count));
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<int32_t>(i * 37 % 1000);
  std::vector<int32_t> tables(static_cast<size_t>(blocks * sequences));
  std::iota(tables.begin(), tables.end(), 0);
  SamplingParams greedy;
  greedy.temperature = 0;
  Batch batch;
  for (int s = 0; s < sequences; ++s) {
    BatchItem& item = batch.items.emplace_back();
    item.tokens = tokens;
    item.start = start;
    item.num_tokens = count;
    item.prompt_length = start + count;
    item.block_table =
        std::span(tables).subspan(static_cast<size_t>(s * blocks), static_cast<size_t>(blocks));
    item.sampling = &greedy;
  }
  std::vector<double> seconds;
  for (int i = 0; i < times; ++i) {
    const double begin = Seconds();
    if (absl::StatusOr<StepOutput> out = engine->runner().Run(batch); !out.ok()) {
      fmt::print(stderr, "{}\n", out.status().ToString());
      std::exit(1);
    }
    seconds.push_back(Seconds() - begin);
  }
  std::sort(seconds.begin(), seconds.end());
  return {seconds.front(), seconds[seconds.size() / 2]};
}

// "1,16" -> {1, 16}; "" -> {}.
std::vector<int> ParseInts(const std::string& list) {
  std::vector<int> out;
  std::istringstream in(list);
  for (std::string item; std::getline(in, item, ',');) out.push_back(std::atoi(item.c_str()));
  return out;
}

#ifdef TANDEM_CUDA
int RunOnGpu(int argc, char** argv) {
  GpuSuiteOptions options;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string flag = argv[i];
    if (flag == "--json") options.json = argv[i + 1];
    if (flag == "--rows") options.rows = argv[i + 1];
    if (flag == "--seconds") options.seconds = std::atoi(argv[i + 1]);
    if (flag == "--batch-invariant") options.batch_invariant = std::string(argv[i + 1]) == "true";
    if (flag == "--pad-query-heads") options.pad_query_heads = std::string(argv[i + 1]) == "true";
  }
  return RunGpuSuite(options);
}
#endif

int Main(int argc, char** argv) {
  WatchNoLockOrders();  // as the programs do
  if (tandem::AnswerHelp(
          argc, argv,
          "engine_bench [--dtype float32|bfloat16] [--kv-cache-dtype auto|fp8] [--threads N]\n"
          "       [--layers N] [--prefill 128,512] [--decode 1,4,16,64] [--context 256] [--repeats "
          "N]\n"
          "       [--json FILE]\n"
          "       engine_bench --device cuda [--json FILE] [--rows PART] [--seconds N]\n"
          "       [--batch-invariant true] [--pad-query-heads true]")) {
    return 0;
  }
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  for (int i = 1; i + 1 < argc; i += 2) {
    if (std::string(argv[i]) != "--device" || std::string(argv[i + 1]) == "cpu") continue;
#ifdef TANDEM_CUDA
    return RunOnGpu(argc, argv);
#else
    fmt::print(stderr, "engine_bench: this build has no CUDA\n");
    return 1;
#endif
  }
  EngineOptions options;
  options.device = "cpu";
  options.dtype = CpuHasBF16() ? "bfloat16" : "float32";
  int layers = 24;
  std::vector<int> prefills = {128, 512, 2048}, decodes = {1, 4, 16, 64};
  std::vector<int> contexts = {256};
  int repeats = 3;
  std::string json;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string flag = argv[i];
    if (flag == "--dtype") options.dtype = argv[i + 1];
    if (flag == "--kv-cache-dtype") options.kv_cache_dtype = argv[i + 1];
    if (flag == "--threads") options.num_threads = std::atoi(argv[i + 1]);
    if (flag == "--prefill") prefills = ParseInts(argv[i + 1]);
    if (flag == "--decode") decodes = ParseInts(argv[i + 1]);
    if (flag == "--context") contexts = ParseInts(argv[i + 1]);
    if (flag == "--json") json = argv[i + 1];
    if (flag == "--repeats") repeats = std::atoi(argv[i + 1]);
    if (flag == "--layers") layers = std::atoi(argv[i + 1]);
  }
  if (!json.empty() && options.kv_cache_dtype != "auto") {
    fmt::print(stderr,
               "engine_bench: --json is for plans, which are of KV as --dtype has it; leave "
               "out --kv-cache-dtype\n");
    return 1;
  }
  options.model_dir = WriteConfig(layers);
  options.load_format = "dummy";
  options.max_num_batched_tokens = 2048;
  options.kv_cache_memory_bytes = int64_t{1} << 30;
  absl::StatusOr<std::unique_ptr<Engine>> engine = Engine::Load(options);
  if (!engine.ok()) {
    fmt::print(stderr, "{}\n", engine.status().ToString());
    return 1;
  }
  fmt::print("{}\n", (*engine)->Banner());
  const bool bf16 = (*engine)->options().dtype == "bfloat16";
  const Element element = bf16 ? Element::kBFloat16 : Element::kFloat32;
  Threads threads((*engine)->options().num_threads);
  const double bandwidth = ReadBandwidth(&threads), flops = PeakFlops(element, &threads);
  Threads every_core(std::max(threads.count(), PhysicalCores()));
  const double host_bandwidth = ReadBandwidth(&every_core);
  fmt::print(
      "read bandwidth {:.1f} GB/s ({:.1f} with all cores), multiply-add peak {:.0f} GFLOP/s\n",
      bandwidth / 1e9, host_bandwidth / 1e9, flops / 1e9);
  const ModelConfig& config = (*engine)->config();
  const double head = static_cast<double>(config.vocab_size) * config.hidden_size;
  const double matrices = static_cast<double>(config.NumParameters()) - head;
  nlohmann::ordered_json rows = nlohmann::ordered_json::array();
  const auto add_row = [&rows](const std::string& name, int sequences, int start, int tokens,
                               double seconds) {
    rows.push_back({{"name", name},
                    {"sequences", sequences},
                    {"start", start},
                    {"tokens", tokens},
                    {"chunk", tokens},
                    {"ms", seconds * 1e3}});
  };
  for (const int tokens : prefills) {
    const Times times = RunSeconds(engine->get(), 1, 0, tokens, std::max(1, repeats - 1));
    const double seconds = times.best;
    add_row(fmt::format("prefill {}", tokens), 1, 0, tokens, times.median);
    const double attention = 2.0 * config.num_layers * config.num_heads * config.head_dim *
                             static_cast<double>(tokens) * tokens;
    const double work = 2.0 * matrices * tokens + attention + 2.0 * head;
    fmt::print("prefill {:5} tokens: {:8.1f} tok/s, {:6.1f} ms, {:4.0f} % of the peak\n", tokens,
               tokens / seconds, seconds * 1e3, 100 * work / seconds / flops);
  }
  for (const int sequences : decodes) {
    for (const int context : contexts) {
      const Times times = RunSeconds(engine->get(), sequences, context, 1, repeats);
      const double seconds = times.best;
      add_row(fmt::format("decode batch {}, {}", sequences, context), sequences, context, 1,
              times.median);
      const double kv = static_cast<double>((*engine)->region().layout.BytesPerToken()) * context;
      const double bytes =
          (matrices + head) * static_cast<double>(ElementSize(element)) + kv * sequences;
      fmt::print("decode batch {:3} at {}: {:8.1f} tok/s, {:6.1f} ms, {:4.0f} % of the bandwidth\n",
                 sequences, context, sequences / seconds, seconds * 1e3,
                 100 * bytes / seconds / bandwidth);
    }
  }
  if (json.empty()) return 0;
  std::ofstream out(json);
  out << nlohmann::ordered_json{{"model", nlohmann::json::parse(ConfigJson(layers))},
                                {"quantisation", bf16 ? "bf16" : "fp32"},
                                {"threads", threads.count()},
                                {"read_bytes_per_second", bandwidth},
                                {"host_read_bytes_per_second", std::max(bandwidth, host_bandwidth)},
                                {"matmul_flops", flops},
                                {"rows", rows}}
             .dump(1)
      << "\n";
  if (!out.flush()) fmt::print(stderr, "engine_bench: {} cannot be written\n", json);
  return out ? 0 : 1;
}

}  // namespace
}  // namespace tandem::engine

int main(int argc, char** argv) { return tandem::engine::Main(argc, argv); }
