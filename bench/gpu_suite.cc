#include "bench/gpu_suite.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <deque>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "fmt/format.h"
#include "nlohmann/json.hpp"

#include "bench/gpu_ceilings.h"
#include "common/base/check.h"
#include "decode_worker/loop.h"
#include "engine/runtime/engine.h"

namespace tandem::engine {
namespace {

constexpr int kChunk = 8192;  // tokens of a prefill step

double Seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double Quantile(std::vector<double> values, double part) {
  TANDEM_CHECK(!values.empty(), "nothing was measured");
  std::sort(values.begin(), values.end());
  const auto last = values.size() - 1;
  return values[std::min(last, static_cast<size_t>(part * static_cast<double>(values.size())))];
}
double Median(const std::vector<double>& values) { return Quantile(values, 0.5); }

// What is measured of one card and of two, and wanted where its row of two is.
constexpr std::array kRankRows = {"decode batch 1, 2048", "decode batch 64, 2048", "prefill 4096"};

// Of weights of 4 bits: inputs with a scale in common, and a scale's bytes on the device.
constexpr int kInt4Group = 128;
constexpr double kInt4ScaleBytes = 4;

constexpr char kConfigJson[] =
    R"({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584,
 "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
 "num_hidden_layers": 28, "vocab_size": 152064, "max_position_embeddings": 32768,
 "rope_theta": 1000000.0, "rms_norm_eps": 1e-06, "tie_word_embeddings": false,
 "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
 "torch_dtype": "bfloat16"})";

std::string WriteConfig(bool int4) {
  const std::filesystem::path dir = std::filesystem::temp_directory_path() /
                                    (int4 ? "tandem_gpu_bench_int4" : "tandem_gpu_bench");
  std::filesystem::create_directories(dir);
  nlohmann::json config = nlohmann::json::parse(kConfigJson);
  if (int4) {
    config["quantization_config"] = {{"quant_method", "gptq"},
                                     {"bits", 4},
                                     {"group_size", kInt4Group},
                                     {"sym", true},
                                     {"desc_act", false}};
  }
  std::ofstream(dir / "config.json") << config;
  return dir.string();
}

// What the steps of a row compute: so many equal sequences of `tokens` after `start` cached ones,
// in chunks.
struct Work {
  int sequences = 0;  // 0: the row times something else
  int start = 0;
  int tokens = 0;
  int chunk = 0;
};

struct Row {
  std::string name;
  // Of value and bound: "ratio", "ms", "s", "us"; "share" and "times" are the better the larger.
  std::string unit;
  double ms = 0;     // measured
  double floor = 0;  // ms; 0: the row has none
  double value = 0;  // what the bound is for
  double bound = 0;
  Work work = {};
  // The same ratio to floors at other product rates of the card; 0: none.
  double hot_ratio = 0;    // what it keeps up
  double turns_ratio = 0;  // what it reaches in turns with this row, for as long
  double turns_rate = 0;   // that, FLOP per second
};

class Suite {
 public:
  explicit Suite(GpuSuiteOptions options) : options_(std::move(options)) {}

  int Run() {
    const auto bandwidth = cuda::ReadBandwidth();
    absl::StatusOr<std::unique_ptr<cuda::Matmul>> matmul = cuda::Matmul::Create(8192);
    for (const absl::Status& status : {bandwidth.status(), matmul.status()}) {
      if (status.ok()) continue;
      fmt::print(stderr, "engine_bench: {}\n", status.ToString());
      return 1;
    }
    bandwidth_ = *bandwidth;
    matmul_ = *std::move(matmul);
    const cuda::Matmul::Rates rates = matmul_->Measure();
    rate_ = rates.burst;
    hot_rate_ = rates.sustained;
    gpu_ = cuda::DescribeGpu();
    fmt::print(
        "{}: read {:.0f} GB/s; 8192 x 8192 x 8192 bf16 product {:.0f} TFLOP/s at first, {:.0f} for "
        "half a second\n",
        gpu_, bandwidth_ / 1e9, rate_ / 1e12, hot_rate_ / 1e12);
    const double start = Seconds();
    if (const int status = Load(); status != 0) return status;
    AddRow({"start with dummy weights to ready", "s", (Seconds() - start) * 1e3, 0,
            Seconds() - start, 15});
    fmt::print("{}\n", engine_->Banner());
    FillPool();
    for (const auto& [batch, bound] : {std::pair{1, 1.12}, {16, 1.15}, {64, 1.15}, {256, 1.15}}) {
      Decode(batch, 2048, bound);
    }
    Decode(1, 32768, 1.15);
    Decode(1, 131008, 1.15);
    Decode(16, 32768, 1.15);
    Prefill("prefill 4096", 1, 4096, 0, 5, 1.15);
    Prefill("prefill 8 x 512", 8, 512, 0, 5, 1.18);
    const double rate = Prefill("prefill 32768", 1, 32768, 0, 3, 1.18);
    Prefill("prefill 131072", 1, 131072, 0, 1, 1.20);
    Prefill("second turn: 512 after 4096", 1, 512, 4096, 9, 1.40);
    HostTime(64);
    MixedLoad(rate);
    if (const int status = RankRows(); status != 0) return status;
    if (const int status = Fp8KvRows(); status != 0) return status;
    if (const int status = Int4Rows(); status != 0) return status;
    PrintTable();
    return WriteJson() ? 0 : 1;
  }

 private:
  bool Wanted(const std::string& name) const {
    const bool beside_ranks =
        std::find(kRankRows.begin(), kRankRows.end(), name) != kRankRows.end();
    return (beside_ranks ? "TP 2 " + name : name).find(options_.rows) != std::string::npos;
  }
  void AddRow(Row row) {
    fmt::print("  {:36} {:10.3f} ms   {}\n", row.name, row.ms, Verdict(row));
    rows_.push_back(std::move(row));
  }
  static std::string Verdict(const Row& row) {
    return fmt::format("{:8.3f} {:5} (must reach {}{}) {}", row.value, row.unit,
                       LargerIsBetter(row) ? ">= " : "<= ", row.bound, Reached(row) ? "" : "SHORT");
  }
  static bool LargerIsBetter(const Row& row) { return row.unit == "share" || row.unit == "times"; }
  static bool Reached(const Row& row) {
    return LargerIsBetter(row) ? row.value >= row.bound : row.value <= row.bound;
  }

  int Load() {
    EngineOptions options;
    options.model_dir = WriteConfig(int4_);
    options.tensor_parallel_size = ranks_;
    options.load_format = "dummy";
    options.device = "cuda";
    options.max_num_batched_tokens = kChunk;
    options.max_num_seqs = 256;
    options.enable_prefix_caching = false;
    options.batch_invariant = options_.batch_invariant;
    options.pad_query_heads = options_.pad_query_heads;
    if (fp8_kv_) options.kv_cache_dtype = "fp8";
    absl::StatusOr<std::unique_ptr<Engine>> engine = Engine::Load(options);
    if (!engine.ok()) {
      fmt::print(stderr, "engine_bench: {}\n", engine.status().ToString());
      return 1;
    }
    engine_ = *std::move(engine);
    std::mt19937 random(5);
    std::uniform_int_distribution<int32_t> token(0, 151000);
    tokens_.resize(131072 + 1024);
    for (int32_t& id : tokens_) id = token(random);
    greedy_.temperature = 0;
    return 0;
  }

  void FillPool() {
    for (const KvRegion& pool : engine_->regions()) {
      (fp8_kv_ ? cuda::FillRandomE4M3 : cuda::FillRandom)(pool.base, pool.TotalBytes(), 3);
    }
  }
  // Whether rows of another engine are wanted, which then takes the card.
  bool AnyWanted(const std::vector<std::string>& names) const {
    return std::any_of(names.begin(), names.end(),
                       [this](const std::string& name) { return Wanted(name); });
  }
  int LoadOther() {
    engine_.reset();
    if (const int status = Load(); status != 0) return status;
    fmt::print("{}\n", engine_->Banner());
    FillPool();
    return 0;
  }
  // Milliseconds of a row that was measured before; 0: it was not.
  double Measured(const std::string& name) const {
    const auto row = std::find_if(rows_.begin(), rows_.end(),
                                  [&](const Row& other) { return other.name == name; });
    return row == rows_.end() ? 0 : row->ms;
  }
  // What differs from the first engine, before the names of its rows.
  std::string Prefix() const {
    if (ranks_ > 1) return fmt::format("TP {} ", ranks_);
    if (int4_) return fp8_kv_ ? "INT4, fp8 KV " : "INT4 ";
    return fp8_kv_ ? "fp8 KV " : "";
  }

  // The same weights with KV in e4m3. Nothing is fitted to these rows and those of 4 bits, so they
  // say no `work`.
  int Fp8KvRows() {
    const std::string long_decode = "decode batch 16, 32768", prefill = "prefill 4096";
    const std::string fp8_long_decode = "fp8 KV " + long_decode, fp8_prefill = "fp8 KV " + prefill;
    if (!AnyWanted({"fp8 KV decode batch 1, 2048", "fp8 KV decode batch 64, 2048", fp8_long_decode,
                    fp8_prefill})) {
      return 0;
    }
    fp8_kv_ = true;
    if (const int status = LoadOther(); status != 0) return status;
    Decode(1, 2048, 1.12);
    Decode(64, 2048, 1.15);
    Decode(16, 32768, 1.15);
    Prefill(fp8_prefill, 1, 4096, 0, 5, 1.15);
    fp8_kv_ = false;
    AddSpeedUp(long_decode, "bf16 KV", fp8_long_decode, 1.5);
    AddRatio(fp8_prefill, prefill, "bf16 KV", 1.03);
    return 0;
  }

  // The same weights over two cards, beside one. Floors are those of a card with half of the layers
  // and all of the head.
  int RankRows() {
    if (!AnyWanted({kRankRows.begin(), kRankRows.end()})) return 0;
    if (cuda::CountGpus() < 2) {
      fmt::print("  rows of two cards are left out: there is one\n");
      return 0;
    }
    ranks_ = 2;
    if (const int status = LoadOther(); status != 0) return status;
    Decode(1, 2048, 1.12);
    Decode(64, 2048, 1.15);
    Prefill("TP 2 prefill 4096", 1, 4096, 0, 5, 1.15);
    ranks_ = 1;
    for (const char* name : kRankRows) {
      AddSpeedUp(name, "TP 1", fmt::format("TP 2 {}", name), 1.6);
    }
    return 0;
  }

  // The same shape with weights of 4 bits, with KV in bfloat16 and then in e4m3.
  int Int4Rows() {
    const std::string long_decode = "INT4 decode batch 16, 32768", prefill = "INT4 prefill 4096";
    const std::string fp8_long_decode = "INT4, fp8 KV decode batch 16, 32768";
    if (!AnyWanted({"INT4 decode batch 1, 2048", "INT4 decode batch 16, 2048",
                    "INT4 decode batch 64, 2048", long_decode, prefill, fp8_long_decode})) {
      return 0;
    }
    int4_ = true;
    if (const int status = LoadOther(); status != 0) return status;
    for (const auto& [batch, bound] : {std::pair{1, 1.35}, {16, 1.35}, {64, 1.40}}) {
      Decode(batch, 2048, bound);
    }
    Decode(16, 32768, 1.35);
    Prefill(prefill, 1, 4096, 0, 5, 1.22);
    AddRatio(prefill, "prefill 4096", "bf16", 1.05);
    if (!Wanted(fp8_long_decode)) return 0;
    fp8_kv_ = true;
    if (const int status = LoadOther(); status != 0) return status;
    Decode(16, 32768, 1.35);
    AddSpeedUp(long_decode, "bf16 KV", fp8_long_decode, 1.5);
    return 0;
  }

  // How many times as fast `name` is as `usual`, where both were measured.
  void AddSpeedUp(const std::string& usual, const std::string& usual_kind, const std::string& name,
                  double bound) {
    const double before = Measured(usual), ms = Measured(name);
    if (before > 0 && ms > 0) {
      AddRow({usual_kind + " / " + name, "times", ms, 0, before / ms, bound});
    }
  }
  void AddRatio(const std::string& name, const std::string& usual, const std::string& usual_kind,
                double bound) {
    const double before = Measured(usual), ms = Measured(name);
    if (before > 0 && ms > 0) {
      AddRow({name + " / " + usual_kind, "ratio", ms, before, ms / before, bound});
    }
  }

  // Block tables of `sequences` sequences of `length` tokens, over blocks in a random order.
  // Empty where the pool does not hold them.
  std::vector<int32_t> Tables(int sequences, int length) {
    const int blocks = BlocksFor(length, engine_->options().block_size);
    std::vector<int32_t> all(static_cast<size_t>(engine_->region().num_blocks));
    for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int32_t>(i);
    std::shuffle(all.begin(), all.end(), std::mt19937(11));
    const size_t wanted = static_cast<size_t>(blocks) * static_cast<size_t>(sequences);
    if (wanted > all.size()) return {};
    all.resize(wanted);
    return all;
  }
  std::span<const int32_t> TableOf(const std::vector<int32_t>& tables, int sequence,
                                   int length) const {
    const size_t blocks = static_cast<size_t>(BlocksFor(length, engine_->options().block_size));
    return std::span(tables).subspan(static_cast<size_t>(sequence) * blocks, blocks);
  }
  StepId Launch(const Batch& batch) {
    const absl::StatusOr<LaunchedStep> step = engine_->runner().Launch(batch);
    TANDEM_CHECK(step.ok(), "{}", step.status().ToString());
    return step->id;
  }
  void Collect(StepId id) {
    const absl::StatusOr<StepOutput> output = engine_->runner().Collect(id);
    TANDEM_CHECK(output.ok(), "{}", output.status().ToString());
  }

  // One decode step of `batch` sequences, whose tokens of the step before (if any) are pending.
  Batch DecodeBatch(int batch, int position, int length, const std::vector<int32_t>& tables,
                    StepId before) const {
    Batch step;
    for (int i = 0; i < batch; ++i) {
      BatchItem& item = step.items.emplace_back();
      item.start = position;
      item.num_tokens = 1;
      item.prompt_length = 1;
      item.tokens = std::span(tokens_).first(static_cast<size_t>(position) + (before == 0));
      if (before != 0) item.pending = {before, i};
      item.block_table = TableOf(tables, i, length);
      item.sampling = &greedy_;
    }
    return step;
  }

  void Decode(int batch, int context, double bound) {
    const std::string name = fmt::format("{}decode batch {}, {}", Prefix(), batch, context);
    if (!Wanted(name)) return;
    constexpr int kWarm = 8, kSteps = 40;
    const int length = context + kWarm + kSteps + 2;
    const std::vector<int32_t> tables = Tables(batch, length);
    if (tables.empty()) return fmt::print("  {:36} does not fit this card\n", name);
    std::vector<double> times;
    StepId before = Launch(DecodeBatch(batch, context, length, tables, 0));
    double last = 0;
    for (int i = 1; i < kWarm + kSteps; ++i) {
      const StepId next = Launch(DecodeBatch(batch, context + i, length, tables, before));
      Collect(before);
      const double now = Seconds();
      if (i > kWarm) times.push_back((now - last) * 1e3);
      last = now;
      before = next;
    }
    Collect(before);
    const double kv = static_cast<double>(engine_->region().layout.BytesPerToken()) *
                      (context + kWarm + kSteps / 2.0) * batch;
    const double floor = (WeightBytes() + kv / ranks_) / bandwidth_ * 1e3;
    AddRow({name, "ratio", Median(times), floor, Median(times) / floor, bound,
            Prefix().empty() ? Work{batch, context + kWarm + kSteps / 2, 1, 1} : Work{}});
  }
  // Of the layers.
  double LayerParameters() const {
    return static_cast<double>(engine_->config().NumParameters()) - 2 * HeadParameters();
  }
  double HeadParameters() const {
    const ModelConfig& c = engine_->config();
    return static_cast<double>(c.vocab_size) * static_cast<double>(c.hidden_size);
  }
  // Of a card: all but the embedding, of which a step reads a row per token.
  double WeightBytes() const {
    const double layer_bytes = int4_ ? 0.5 + kInt4ScaleBytes / kInt4Group : 2;
    return layer_bytes * LayerParameters() / ranks_ + 2 * HeadParameters();
  }

  // Time from launch to the first token of `sequences` prompts of `count` tokens after `start`
  // cached ones. Returns tokens per second. In turns with it, for as long, large products alone:
  // how fast the card computes depends on how warm it is, and after which work.
  double Prefill(const std::string& name, int sequences, int count, int start, int repeats,
                 double bound) {
    if (!Wanted(name) && !Wanted("mixed")) return 0;
    const int length = start + count;
    const std::vector<int32_t> tables = Tables(sequences, length);
    if (tables.empty()) {
      fmt::print("  {:36} does not fit this card\n", name);
      return 0;
    }
    constexpr double kMostSeconds = 2;  // of products in a turn: the card's state is settled then
    std::vector<double> times, rates;
    for (int repeat = -1; repeat < repeats; ++repeat) {
      if (repeat < 0 && count > 32768) continue;  // shorter rows have warmed the card up
      const double begin = Seconds();
      std::deque<StepId> in_flight;
      for (int done = 0; done < count; done += kChunk / sequences) {
        Batch step;
        for (int i = 0; i < sequences; ++i) {
          BatchItem& item = step.items.emplace_back();
          item.start = start + done;
          item.num_tokens = std::min(kChunk / sequences, count - done);
          item.prompt_length = length;
          item.tokens = std::span(tokens_).first(static_cast<size_t>(length));
          item.block_table = TableOf(tables, i, length);
          if (done + item.num_tokens == count) item.sampling = &greedy_;
        }
        if (in_flight.size() == 2) {
          Collect(in_flight.front());
          in_flight.pop_front();
        }
        in_flight.push_back(Launch(step));
      }
      for (const StepId id : in_flight) Collect(id);
      const double seconds = Seconds() - begin;
      const double rate = matmul_->RateFor(std::min(seconds, kMostSeconds));
      if (repeat < 0) continue;
      times.push_back(seconds * 1e3);
      rates.push_back(rate);
    }
    const double t = count, pairs = t * start + t * t / 2;
    const ModelConfig& c = engine_->config();
    const double flops = sequences * (2 * LayerParameters() * t +
                                      4.0 * c.num_layers * c.num_heads * c.head_dim * pairs);
    const double floor = flops / ranks_ / rate_ * 1e3;
    if (Wanted(name)) {
      const auto ratio_at = [&](double rate) {
        return Median(times) / (flops / ranks_ / rate * 1e3);
      };
      AddRow({name, "ratio", Median(times), floor, ratio_at(rate_), bound,
              Prefix().empty() ? Work{sequences, start, count, kChunk / sequences} : Work{},
              ratio_at(hot_rate_), ratio_at(Median(rates)), Median(rates)});
    }
    return sequences * t / Median(times) * 1e3;
  }

  // What the loop's thread spends on a step while the GPU works: in Launch, and in Collect once the
  // step is over.
  void HostTime(int batch) {
    const std::string name = fmt::format("host time per step, batch {}", batch);
    if (!Wanted(name)) return;
    constexpr int kSteps = 50, kContext = 2048;
    const int length = kContext + kSteps + 2;
    const std::vector<int32_t> tables = Tables(batch, length);
    std::vector<double> times;
    StepId before = Launch(DecodeBatch(batch, kContext, length, tables, 0));
    for (int i = 1; i < kSteps; ++i) {
      const Batch step = DecodeBatch(batch, kContext + i, length, tables, before);
      const double begin = Seconds();
      const StepId next = Launch(step);
      double host = Seconds() - begin;
      std::this_thread::sleep_for(std::chrono::milliseconds(20));  // both steps are over
      const double end = Seconds();
      Collect(before);
      host += Seconds() - end;
      if (i > 5) times.push_back(host * 1e3);
      before = next;
    }
    Collect(before);
    AddRow({name, "us", Median(times), 0, Median(times) * 1e3, 150});
  }

  // A unified worker's loop: 16 streams draw tokens, first alone, then while a prompt of 32k tokens
  // is always being computed.
  void MixedLoad(double undisturbed_rate) {
    if (!Wanted("mixed load")) return;
    constexpr int kStreams = 16, kContext = 2048, kPrompt = 32768;
    Metrics registry;
    decode::DecodeMetrics metrics(&registry);
    decode::EventInbox inbox(1024);
    struct Reader {
      std::shared_ptr<decode::TokenStream> stream;
      double last = 0;
      std::vector<double> gaps;  // ms
      bool ended = false;
      void Read() {
        while (!ended) {
          const decode::TokenStream::Item item = stream->Take();
          if (std::holds_alternative<std::monostate>(item)) return;
          if (std::holds_alternative<absl::Status>(item)) {
            ended = true;
            return;
          }
          const double now = Seconds();
          if (last > 0) gaps.push_back((now - last) * 1e3);
          last = now;
        }
      }
    };
    // Outlives the loop, which ends the streams.
    std::deque<Reader> readers;
    decode::LoopOptions options;
    options.admission.limits = {engine_->options().block_size, 64, kChunk};
    options.admission.max_model_len = engine_->options().max_model_len;
    options.admission.unified = true;
    options.publish.max_pending_tokens = 1 << 20;
    options.target_step = absl::Milliseconds(30);
    options.row_tile = 256;
    decode::LoopParts parts;
    parts.runner = &engine_->runner();
    parts.pool = &engine_->pool();
    parts.cache = &engine_->cache();
    parts.clock = Clock::Real();
    parts.metrics = &metrics;
    parts.inbox = &inbox;
    decode::Loop loop(std::move(options), parts, {});

    uint64_t id = 0;
    std::mt19937 random(9);
    std::uniform_int_distribution<int32_t> token(0, 151000);
    const auto submit = [&](int prompt, int max_tokens) -> Reader& {
      Reader& reader = readers.emplace_back();
      reader.stream = std::make_shared<decode::TokenStream>([&reader] { reader.Read(); }, nullptr);
      decode::WorkArrived event;
      event.work.id = ++id;
      event.work.tokens.resize(static_cast<size_t>(prompt));
      for (int32_t& t : event.work.tokens) t = token(random);
      event.work.sampling.temperature = 0;
      event.work.sampling.max_tokens = max_tokens;
      event.work.sampling.ignore_eos = true;
      event.work.arrived = Clock::Real()->Now();
      event.stream = reader.stream;
      inbox.Push(std::move(event));
      return reader;
    };
    std::vector<Reader*> streams;
    for (int i = 0; i < kStreams; ++i) streams.push_back(&submit(kContext, 30000));
    const auto step_for = [&](double seconds) {
      for (auto& reader : streams) reader->last = 0, reader->gaps.clear();
      for (const double end = Seconds() + seconds; Seconds() < end;) {
        loop.Step(absl::ZeroDuration());
      }
      std::vector<double> gaps;
      for (auto& reader : streams) {
        gaps.insert(gaps.end(), reader->gaps.begin(), reader->gaps.end());
      }
      return gaps;
    };
    step_for(2);  // the streams' own prompts
    const std::vector<double> quiet = step_for(2);
    // One prompt is always there: the next arrives when the last one has its token.
    Reader* prompt = &submit(kPrompt, 1);
    step_for(1);  // the cost model learns
    for (auto& reader : streams) reader->last = 0, reader->gaps.clear();
    const double begin = Seconds();
    const double computed_before = metrics.worker.prompt_tokens.Value();
    while (Seconds() < begin + options_.seconds) {
      loop.Step(absl::ZeroDuration());
      if (prompt->ended) prompt = &submit(kPrompt, 1);
    }
    const double rate =
        (metrics.worker.prompt_tokens.Value() - computed_before) / (Seconds() - begin);
    std::vector<double> gaps;
    for (auto& reader : streams) {
      gaps.insert(gaps.end(), reader->gaps.begin(), reader->gaps.end());
    }
    fmt::print("  quiet: p50 {:.1f} ms, p99 {:.1f} ms; with prompts: p50 {:.1f} ms, {:.0f} tok/s\n",
               Median(quiet), Quantile(quiet, 0.99), Median(gaps), rate);
    const double p99 = Quantile(gaps, 0.99);
    AddRow({"mixed load: ITL p99", "ms", p99, 0, p99, 40});
    AddRow({"mixed load: prefill rate", "share", 0, 0, rate / undisturbed_rate, 0.75});
  }

  void PrintTable() const {
    fmt::print(
        "\n| | floor ms | ms | ratio | must reach | at the rate kept up | products in turns, "
        "TFLOP/s "
        "| ratio to those |\n");
    fmt::print("|---|---|---|---|---|---|---|---|\n");
    int reached = 0;
    for (const Row& row : rows_) {
      reached += Reached(row);
      const auto shown = [](double value) { return value > 0 ? fmt::format("{:.2f}", value) : ""; };
      fmt::print("| {} | {} | {:.2f} | {:.3g} {} | {} | {} | {} | {} |{}\n", row.name,
                 shown(row.floor), row.ms, row.value, row.unit, row.bound, shown(row.hot_ratio),
                 row.turns_rate > 0 ? fmt::format("{:.0f}", row.turns_rate / 1e12) : "",
                 shown(row.turns_ratio), Reached(row) ? "" : " short");
    }
    fmt::print("{} of {} rows reach their bound\n", reached, rows_.size());
  }

  bool WriteJson() const {
    if (options_.json.empty()) return true;
    nlohmann::json rows = nlohmann::json::array();
    for (const Row& row : rows_) {
      rows.push_back({{"name", row.name},
                      {"unit", row.unit},
                      {"ms", row.ms},
                      {"floor_ms", row.floor},
                      {"value", row.value},
                      {"bound", row.bound},
                      {"ratio_at_rate_kept_up", row.hot_ratio},
                      {"ratio_to_products_in_turns", row.turns_ratio},
                      {"products_in_turns_flops", row.turns_rate},
                      {"reached", Reached(row)}});
      if (row.work.sequences == 0) continue;
      rows.back().update({{"sequences", row.work.sequences},
                          {"start", row.work.start},
                          {"tokens", row.work.tokens},
                          {"chunk", row.work.chunk}});
    }
    std::ofstream out(options_.json);
    out << nlohmann::json{{"gpu", gpu_},
                          {"model", nlohmann::json::parse(kConfigJson)},
                          {"quantisation", "bf16"},
                          {"read_bytes_per_second", bandwidth_},
                          {"matmul_flops", rate_},
                          {"matmul_flops_kept_up", hot_rate_},
                          {"rows", rows}}
               .dump(1)
        << "\n";
    if (!out.flush()) fmt::print(stderr, "engine_bench: {} cannot be written\n", options_.json);
    return static_cast<bool>(out);
  }

  const GpuSuiteOptions options_;
  std::string gpu_;
  double bandwidth_ = 0;  // bytes per second
  double rate_ = 0;       // FLOP per second, while the card is cool
  double hot_rate_ = 0;   // that it keeps up
  std::unique_ptr<cuda::Matmul> matmul_;
  bool int4_ = false;    // the engine's weights
  bool fp8_kv_ = false;  // its KV
  int ranks_ = 1;        // the engine's
  std::unique_ptr<Engine> engine_;
  std::vector<int32_t> tokens_;
  SamplingParams greedy_;
  std::vector<Row> rows_;
};

}  // namespace

int RunGpuSuite(const GpuSuiteOptions& options) { return Suite(options).Run(); }

}  // namespace tandem::engine
