// Sampling on the GPU against the CPU's DrawRow: random specs over ordinary and hostile logits.
// Tokens, statuses and alternatives must be the same, log probabilities within 1e-5. Each batch is
// launched as a whole and again row by row, with the same results bit for bit. `sample_test time`
// prints what the usual cases take instead; `sample_test small` runs a few specs, `sample_test
// tiny` some without clusters.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "engine/kernels/cpu/sample.h"
#include "engine/kernels/cuda/sample.h"
#include "tests/gpu/device_array.h"

namespace tandem::engine::cuda {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int kDrawnBefore = 8;

int failures = 0;
int multiprocessors = 0;

// ---- Rows of logits ----

enum Kind {
  kNormal,
  kSharp,
  kPeaks,
  kTies,
  kEqual,
  kMostlyMasked,
  kHasNan,
  kHasInf,
  kAllMinusInf,
  kHuge,
  kOnlyOne,
  kNearlyEqual,
  kZeros,
  kTieAtTop,
  kKinds,
};

void FillRow(Kind kind, std::mt19937& random, int vocab, float* row) {
  std::normal_distribution<float> normal;
  const auto any = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  for (int i = 0; i < vocab; ++i) {
    float value = normal(random);
    switch (kind) {
      case kNormal:
      case kHasNan:
      case kHasInf:
        value *= 2.5f;
        break;
      case kSharp:
        value *= 12;
        break;
      case kPeaks:
        value = any(1000) == 0 ? 20 + value : value;
        break;
      case kTies:
        value = std::round(value * 2) / 2;
        break;
      case kEqual:
        value = -3.25f;
        break;
      case kMostlyMasked:
        value = any(20) == 0 ? value : -kInf;
        break;
      case kAllMinusInf:
      case kOnlyOne:
        value = -kInf;
        break;
      case kHuge:
        value = (any(2) == 0 ? 3e38f : -3e38f) * (0.5f + 0.5f * static_cast<float>(any(2)));
        break;
      case kNearlyEqual:
        value = 10 + static_cast<float>(any(300)) * 0x1p-20f;
        break;
      case kZeros:
        value = any(3) == 0 ? -0.0f : any(2) == 0 ? 0.0f : value * 1e-42f;
        break;
      case kTieAtTop:
        value = std::min(value, 1.5f);
        break;
      case kKinds:
        break;
    }
    row[i] = value;
  }
  if (kind == kHasNan) row[any(vocab)] = std::nanf("");
  if (kind == kHasInf) row[any(vocab)] = kInf;
  if (kind == kOnlyOne) row[any(vocab)] = -7;
}

// ---- Specs ----

template <typename T>
T OneOf(std::mt19937& random, std::initializer_list<T> values) {
  return values.begin()[random() % values.size()];
}

DrawSpec RandomSpec(std::mt19937& random, int row, int valid, std::vector<int32_t>* lists) {
  const auto any = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  DrawSpec spec;
  spec.item = row;
  spec.alternatives = OneOf(random, {-1, -1, -1, 0, 1, 5, 20});
  if (any(8) == 0) {
    spec.scored = any(12) == 0 ? valid + any(3) : any(valid);
    return spec;
  }
  spec.seed = static_cast<uint64_t>(random()) << 32 | random();
  spec.position = any(131072);
  spec.temperature =
      OneOf(random, {0.0f, 1e-6f, 1e-5f, 0.01f, 0.3f, 0.7f, 0.7f, 1.0f, 1.0f, 1.5f, 5.0f, 1e30f});
  spec.top_p = OneOf(random, {1.0f, 1.0f, 0.8f, 0.8f, 0.95f, 0.5f, 0.999999f, 0.1f, 0.0f, 1e-5f});
  spec.top_k = OneOf(random, {0, 0, -1, 1, 2, 5, 20, 20, 50, 128, 129, 1000, 1000000});
  spec.min_p = OneOf(random, {0.0f, 0.0f, 0.0f, 0.05f, 0.5f, 1.0f, 1e-9f});
  spec.masked_begin = static_cast<int32_t>(lists->size());
  if (any(4) == 0) {
    for (int i = any(6); i >= 0; --i) lists->push_back(any(valid + 3));
    if (any(30) == 0) {
      for (int i = 0; i < valid; ++i) lists->push_back(i);
    }
  }
  spec.masked_end = spec.history_begin = static_cast<int32_t>(lists->size());
  if (any(2) == 0) {
    spec.repetition_penalty = OneOf(random, {1.0f, 1.05f, 1.05f, 1.3f, 0.5f, 10.0f, 1e-30f});
    spec.presence_penalty = OneOf(random, {0.0f, 0.0f, 1.5f, -2.0f});
    spec.frequency_penalty = OneOf(random, {0.0f, 0.0f, 0.7f, -0.3f});
    const int length = OneOf(random, {0, 1, 30, 700, 5000});
    const int spread = any(2) == 0 ? valid + 2 : std::min(valid, 50);
    for (int i = 0; i < length; ++i) lists->push_back(any(spread));
    if (any(2) == 0) lists->push_back(PendingId(any(kDrawnBefore)));
  }
  spec.history_end = static_cast<int32_t>(lists->size());
  spec.output_begin = spec.history_begin + any(spec.history_end - spec.history_begin + 1);
  return spec;
}

// ---- Comparison ----

bool Close(float a, float b) {
  return a == b || std::abs(a - b) <= 1e-5f * std::max(1.0f, std::abs(b) * 0.02f);
}

std::string Describe(const DrawResult& r) {
  char text[96];
  std::snprintf(text, sizeof(text), "status %d token %d logprob %g [", static_cast<int>(r.status),
                r.token, static_cast<double>(r.logprob));
  std::string out = text;
  for (int i = 0; i < std::min(r.num_alternatives, kMaxAlternatives); ++i) {
    std::snprintf(text, sizeof(text), " %d:%g", r.alternatives[i],
                  static_cast<double>(r.alternative_logprobs[i]));
    out.append(text);
  }
  return out.append(" ]");
}

bool Same(const DrawResult& got, const DrawResult& wanted) {
  if (got.status != wanted.status || got.token != wanted.token) return false;
  if (!Close(got.logprob, wanted.logprob)) return false;
  if (got.num_alternatives != wanted.num_alternatives) return false;
  for (int i = 0; i < wanted.num_alternatives; ++i) {
    if (got.alternatives[i] != wanted.alternatives[i]) return false;
    if (!Close(got.alternative_logprobs[i], wanted.alternative_logprobs[i])) return false;
  }
  return true;
}

void ReportMismatch(const DrawSpec& s, Kind kind, int vocab, int valid, const DrawResult& got,
                    const DrawResult& wanted) {
  if (++failures > 12) return;
  std::printf(
      "FAILED kind %d vocab %d valid %d: scored %d alt %d pos %d T %g top_p %g min_p %g top_k %d "
      "rep %g pres %g freq %g masked %d history %d output %d\n  got    %s\n  wanted %s\n",
      kind, vocab, valid, s.scored, s.alternatives, s.position, s.temperature, s.top_p, s.min_p,
      s.top_k, s.repetition_penalty, s.presence_penalty, s.frequency_penalty,
      s.masked_end - s.masked_begin, s.history_end - s.history_begin,
      s.history_end - s.output_begin, Describe(got).c_str(), Describe(wanted).c_str());
}

// All rows of one batch on the CPU.
std::vector<DrawResult> Reference(const std::vector<float>& logits, int vocab, int valid,
                                  const std::vector<DrawSpec>& specs,
                                  const std::vector<int32_t>& lists,
                                  const std::vector<int32_t>& drawn_before) {
  std::vector<DrawResult> results(specs.size());
  std::atomic<size_t> next = 0;
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < std::max(1u, std::thread::hardware_concurrency()); ++t) {
    threads.emplace_back([&] {
      DrawScratch scratch;
      for (size_t i; (i = next++) < specs.size();) {
        results[i] =
            DrawRow(logits.data() + i * static_cast<size_t>(vocab), static_cast<size_t>(valid),
                    specs[i], lists.data(), drawn_before.data(), &scratch);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return results;
}

class Batch {
 public:
  Batch(int vocab, int valid, int rows)
      : vocab_(vocab), valid_(valid), rows_(rows), scratch_(SampleScratchBytes(rows, vocab)) {
    scratch_.Zero();
    logits_.resize(static_cast<size_t>(rows) * static_cast<size_t>(vocab));
    specs_.resize(static_cast<size_t>(rows));
    kinds_.resize(specs_.size());
  }

  void RunRandom(std::mt19937& random, bool row_by_row) {
    const size_t vocab = static_cast<size_t>(vocab_);
    for (size_t i = 0; i < specs_.size(); ++i) {
      // Hostile rows are one half.
      kinds_[i] = static_cast<Kind>(random() % 2 == 0 ? random() % 3 : random() % kKinds);
      FillRow(kinds_[i], random, vocab_, logits_.data() + i * vocab);
      // What lies in the padding means nothing.
      for (size_t j = static_cast<size_t>(valid_); j < vocab; ++j) {
        logits_[i * vocab + j] = random() % 2 == 0 ? 1e30f : std::nanf("");
      }
    }
    DeviceArray<float> logits(logits_);
    for (int round = 0; round < 4; ++round) RunSpecs(random, logits, row_by_row && round == 0);
  }

 private:
  void RunSpecs(std::mt19937& random, const DeviceArray<float>& logits, bool row_by_row) {
    std::vector<int32_t> lists = {-99}, drawn_before;
    for (int i = 0; i < kDrawnBefore; ++i) {
      drawn_before.push_back(static_cast<int32_t>(random() % static_cast<unsigned>(valid_)));
    }
    for (size_t i = 0; i < specs_.size(); ++i) {
      specs_[i] = RandomSpec(random, static_cast<int>(i), valid_, &lists);
    }
    const std::vector<DrawResult> wanted =
        Reference(logits_, vocab_, valid_, specs_, lists, drawn_before);
    DeviceArray<DrawSpec> specs(specs_);
    DeviceArray<int32_t> device_lists(lists), before(drawn_before), drawn(specs_.size());
    DeviceArray<DrawResult> results(specs_.size());
    SampleArgs args;
    args.logits = logits.get();
    args.count = static_cast<int>(specs_.size());
    args.valid_vocab = valid_;
    args.specs = specs.get();
    args.token_lists = device_lists.get();
    args.drawn_before = before.get();
    args.drawn = drawn.get();
    args.results = results.get();
    results.Poison();
    drawn.Poison();
    Launch(args);
    const std::vector<DrawResult> got = results.ToHost();
    const std::vector<int32_t> got_drawn = drawn.ToHost();
    for (size_t i = 0; i < specs_.size(); ++i) {
      const bool is_drawn = specs_[i].scored < 0;
      const int32_t token = wanted[i].status == DrawStatus::kOk ? wanted[i].token : 0;
      if (!Same(got[i], wanted[i]) || got_drawn[i] != (is_drawn ? token : -1)) {
        ReportMismatch(specs_[i], kinds_[i], vocab_, valid_, got[i], wanted[i]);
      }
    }
    if (!row_by_row) return;
    results.Poison();
    for (size_t i = 0; i < specs_.size(); ++i) {
      SampleArgs one = args;
      one.logits += i * static_cast<size_t>(vocab_);
      one.count = 1;
      one.specs += i;
      one.results += i;
      Launch(one);
    }
    const std::vector<DrawResult> again = results.ToHost();
    for (size_t i = 0; i < specs_.size(); ++i) {
      if (std::memcmp(&again[i], &got[i], sizeof(DrawResult)) == 0) continue;
      std::printf("alone:\n");
      ReportMismatch(specs_[i], kinds_[i], vocab_, valid_, again[i], got[i]);
    }
  }

  void Launch(const SampleArgs& args) {
    LaunchOptions options;
    options.multiprocessors = multiprocessors;
    TANDEM_CUDA_CHECK(SampleRows(args, vocab_, rows_, scratch_.get(), options));
    TANDEM_CUDA_CHECK(cudaDeviceSynchronize());
  }

  const int vocab_, valid_, rows_;
  DeviceArray<char> scratch_;
  std::vector<float> logits_;
  std::vector<DrawSpec> specs_;
  std::vector<Kind> kinds_;
};

// `small`: a little of it, for compute-sanitizer.
void CompareWithCpu(bool small) {
  struct Case {
    int vocab, valid, rows, batches;
  };
  const Case cases[] = {
      {7, 7, 8, 5},           {100, 97, 64, 12},       {1003, 1003, 33, 8},
      {4096, 4096, 64, 10},   {32000, 31999, 64, 10},  {151937, 151643, 5, 2},
      {152064, 151665, 1, 6}, {152064, 151665, 64, 2}, {152064, 152064, 17, 2},
  };
  int seed = 1, specs = 0;
  for (const Case& c : cases) {
    if (small && c.vocab > 5000) break;
    const int before = failures;
    Batch batch(c.vocab, c.valid, c.rows);
    for (int i = 0; i < (small ? 1 : c.batches); ++i) {
      std::mt19937 random(static_cast<unsigned>(seed++));
      batch.RunRandom(random, i < 2);
      specs += 4 * c.rows;
    }
    std::printf("vocab %d, %d rows: %d failures\n", c.vocab, c.rows, failures - before);
    std::fflush(stdout);
  }
  std::printf("%d specs\n", specs);
}

// More rows than there are places for clusters, and few tokens: for racecheck, which does not come
// back from a kernel whose blocks read each other's shared memory.
void WithoutClusters() {
  std::mt19937 random(1);
  Batch batch(7, 7, 4 * multiprocessors);
  batch.RunRandom(random, false);
}

// ---- Times ----

void Time(const char* name, int rows, int history, const std::function<void(DrawSpec*)>& set,
          float scale) {
  constexpr int kVocab = 152064, kRepeat = 20;
  const size_t count = static_cast<size_t>(rows) * kVocab;
  // Sums of three uniform numbers, about normal.
  std::vector<float> host(count);
  for (size_t i = 0; i < count; ++i) {
    host[i] = (RandomAt(1, i) + RandomAt(2, i) + RandomAt(3, i)) * scale;
  }
  DeviceArray<float> logits(host);
  std::vector<DrawSpec> specs(static_cast<size_t>(rows));
  std::vector<int32_t> lists(static_cast<size_t>(rows * history) + 1);
  for (size_t i = 0; i < lists.size(); ++i) {
    lists[i] = static_cast<int32_t>((RandomAt(5, i) + 1) * 0.5f * 151000);
  }
  for (int i = 0; i < rows; ++i) {
    DrawSpec& spec = specs[static_cast<size_t>(i)];
    spec.item = i;
    spec.seed = static_cast<uint64_t>(i);
    spec.history_begin = i * history;
    spec.output_begin = i * history + history / 2;
    spec.history_end = (i + 1) * history;
    set(&spec);
  }
  DeviceArray<DrawSpec> device_specs(specs);
  DeviceArray<int32_t> device_lists(lists), drawn(specs.size());
  DeviceArray<DrawResult> results(specs.size());
  DeviceArray<char> scratch(SampleScratchBytes(rows, kVocab));
  scratch.Zero();
  SampleArgs args;
  args.logits = logits.get();
  args.count = rows;
  args.valid_vocab = 151665;
  args.specs = device_specs.get();
  args.token_lists = device_lists.get();
  args.drawn = drawn.get();
  args.results = results.get();
  cudaStream_t stream;
  TANDEM_CUDA_CHECK(cudaStreamCreate(&stream));
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  TANDEM_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < kRepeat; ++i) {
    LaunchOptions options;
    options.stream = stream;
    options.multiprocessors = multiprocessors;
    TANDEM_CUDA_CHECK(SampleRows(args, kVocab, rows, scratch.get(), options));
  }
  TANDEM_CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
  TANDEM_CUDA_CHECK(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t begin, end;
  TANDEM_CUDA_CHECK(cudaEventCreate(&begin));
  TANDEM_CUDA_CHECK(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < 7; ++i) {
    TANDEM_CUDA_CHECK(cudaEventRecord(begin, stream));
    TANDEM_CUDA_CHECK(cudaGraphLaunch(exec, stream));
    TANDEM_CUDA_CHECK(cudaEventRecord(end, stream));
    TANDEM_CUDA_CHECK(cudaEventSynchronize(end));
    float ms = 0;
    TANDEM_CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
    times.push_back(ms * 1000 / kRepeat);
  }
  std::sort(times.begin(), times.end());
  std::printf("%-28s rows %3d history %6d: %7.1f us\n", name, rows, history, times[3]);
  std::fflush(stdout);
}

void Times() {
  const auto greedy = [](DrawSpec*) {};
  const auto qwen = [](DrawSpec* s) {
    s->temperature = 0.7f;
    s->top_p = 0.8f;
    s->top_k = 20;
    s->repetition_penalty = 1.05f;
  };
  const auto sampled = [](DrawSpec* s) { s->temperature = 1; };
  const auto nucleus = [](DrawSpec* s) {
    s->temperature = 1;
    s->top_p = 0.95f;
  };
  const auto top_1000 = [](DrawSpec* s) {
    s->temperature = 1;
    s->top_k = 1000;
  };
  const auto logprobs = [](DrawSpec* s) { s->alternatives = 20; };
  const auto frequency = [](DrawSpec* s) {
    s->frequency_penalty = 0.5f;
    s->presence_penalty = 0.1f;
  };
  for (const int rows : {1, 16, 64, 256}) {
    Time("greedy", rows, 0, greedy, 8);
    Time("qwen defaults", rows, 2048, qwen, 8);
    Time("temperature 1", rows, 0, sampled, 8);
    Time("top-p 0.95", rows, 0, nucleus, 8);
    Time("logprobs 20", rows, 0, logprobs, 8);
  }
  Time("top-p 0.95, flat", 64, 0, nucleus, 1);
  Time("top-k 1000", 64, 0, top_1000, 8);
  Time("frequency penalty", 64, 32768, frequency, 8);
  Time("qwen defaults", 16, 131072, qwen, 8);
}

constexpr int kSkipped = 77;

}  // namespace
}  // namespace tandem::engine::cuda

int main(int argc, char** argv) {
  using namespace tandem::engine::cuda;
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("skipped: no CUDA device\n");
    return kSkipped;
  }
  TANDEM_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0));
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "time") {
    Times();
    return 0;
  }
  if (mode == "tiny") {
    WithoutClusters();
  } else {
    CompareWithCpu(mode == "small");
  }
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
