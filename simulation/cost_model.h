// How long a card takes for one step of a model.
//
//   seconds = fixed + weight bytes / read + KV bytes / read KV + FLOPs of products / product rate
//                   + FLOPs of chunks' attention / attention rate
//
// A sum and not the larger of reading and computing: what was measured lies closer to it, above all
// for batches of some hundred rows, where neither is negligible (docs/planning.md). The five
// figures come from a card's data sheet, derated, or are fitted to a bench of the engine; what the
// bench says nothing of then stays as the data sheet has it.
//
// Pure values.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

#include "common/base/model_config.h"

namespace tandem::simulation {

// What one step computes, whatever the model.
struct StepShape {
  int rows = 0;   // tokens
  int draws = 0;  // rows whose next token is drawn
  // KV that runs of one token, decode steps, attend to.
  int64_t decode_positions = 0;
  // (token, position that it attends to) of longer runs.
  int64_t chunk_pairs = 0;

  // `num_tokens` tokens of one sequence after its first `start`; the last one is followed by a draw
  // or not.
  void Add(int start, int num_tokens, bool draw);
};

// How weights of the layers' matrices are kept. Embedding and head stay as the activations are, as
// in the checkpoints that people publish.
struct Quantisation {
  std::string name;
  double bytes_per_weight = 2;  // of a layer's matrices, with its scales
  DType activations = DType::kBFloat16;
};
// fp32, bf16, int8 (a scale for each row), int4 (scale and zero for each 128 weights).
const std::vector<Quantisation>& Quantisations();
// Null for an unknown name.
const Quantisation* FindQuantisation(const std::string& name);

// A model as the cost model sees it.
class ModelWork {
 public:
  // `kv_dtype`: of KV; unset: that of the activations.
  ModelWork(const ModelConfig& config, const Quantisation& quantisation,
            std::optional<DType> kv_dtype = std::nullopt);

  int64_t WeightBytes() const { return weight_bytes_; }  // in a card's memory
  int64_t KvBytesPerToken() const { return kv_bytes_per_token_; }
  int num_layers() const { return num_layers_; }

 private:
  friend class CostModel;
  double layer_weights_ = 0;  // numbers, of all layers' matrices
  double head_weights_ = 0;
  double layer_bytes_ = 0;
  double head_bytes_ = 0;
  double flops_per_pair_ = 0;  // of attention
  int64_t weight_bytes_ = 0;
  int64_t kv_bytes_per_token_ = 0;
  int num_layers_ = 0;
};

// A card as its data sheet has it.
struct Card {
  std::string name;
  double read_bytes_per_second = 0;
  double flops = 0;  // dense bfloat16 with float32 sums, per second
  int64_t memory_bytes = 0;
  double link_bytes_per_second = 0;  // KV to another card, through pinned memory of the host
  bool hopper = false;
};

// A host whose cores and memory all its workers share, as those without cards do.
struct Host {
  int cores = 0;                     // 0: every worker has all of its own
  int threads = 1;                   // of a worker's steps
  double read_bytes_per_second = 0;  // of all cores together; 0: as many as the workers ask for
};
// By how much what a step reads, and what it computes, take longer than alone.
struct Slowdown {
  double read = 1;
  double compute = 1;
};
// While `workers` compute at once, of which each reads `read_bytes_per_second` alone. Threads that
// find no core wait for one, and a step's are all waited for.
Slowdown SlowdownOf(const Host& host, int workers, double read_bytes_per_second);

// What is kept of a data sheet.
struct Derates {
  double read = 1;
  double product = 1;
  double attention = 1;
  double fixed_seconds = 0;  // of each step
};
// What the engine keeps of an H200's data sheet: fitted to the table of docs/performance.md, whose
// rows that reproduces within 9 %.
Derates MeasuredDerates();

// A run of steps that was timed: `sequences` equal ones that compute `tokens` each after `start`
// cached ones, `chunk` of each a step.
struct BenchRow {
  std::string name;
  int sequences = 1;
  int start = 0;
  int tokens = 1;
  int chunk = 1;
  double seconds = 0;
};

// engine_bench --json FILE.
struct Bench {
  Card card;  // as measured in the same run; no memory, no link
  ModelConfig model;
  Quantisation quantisation;
  int threads = 1;                        // of the steps
  double host_read_bytes_per_second = 0;  // with a thread on every core; 0: it does not say
  std::vector<BenchRow> rows;
};
// INVALID_ARGUMENT names the key.
absl::StatusOr<Bench> ParseBench(const std::string& json);

class CostModel {
 public:
  // From a data sheet.
  CostModel(const Card& card, const Derates& derates);
  // The least squares of the rows' relative errors, no term below 0, with a light pull to what
  // `prior` has.
  static CostModel Fit(const Bench& bench, const CostModel& prior);

  double Seconds(const ModelWork& model, const StepShape& step,
                 const Slowdown& slowdown = {}) const;
  // Of all steps of the row.
  double Seconds(const ModelWork& model, const BenchRow& row) const;
  // What it reads when it does nothing else.
  double ReadBytesPerSecond() const { return 1 / seconds_per_[1]; }
  // What it keeps of a data sheet.
  Derates SharesOf(const Card& card) const;

 private:
  static constexpr size_t kTerms = 5;
  using Terms = std::array<double, kTerms>;
  static Terms TermsOf(const ModelWork& model, const StepShape& step);
  static Terms TermsOf(const ModelWork& model, const BenchRow& row);
  double Sum(const Terms& terms) const;

  Terms seconds_per_ = {};  // step, weight byte, KV byte, product FLOP, attention FLOP
};

}  // namespace tandem::simulation
