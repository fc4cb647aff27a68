#include "simulation/cost_model.h"

#include <algorithm>

#include "nlohmann/json.hpp"

#include "common/base/status.h"

namespace tandem::simulation {
namespace {

using nlohmann::json;

// Of a term's squared relative distance to the prior, beside the rows' squared relative errors.
constexpr double kPull = 1e-4;
// Coordinate descent over five terms; a sweep costs nanoseconds.
constexpr int kSweeps = 20000;

absl::StatusOr<double> Number(const json& object, const char* key) {
  const auto it = object.find(key);
  if (it == object.end() || !it->is_number() || !(it->get<double>() > 0)) {
    return InvalidArgument("{} must be a number above 0", key);
  }
  return it->get<double>();
}

absl::StatusOr<int> Count(const json& object, const char* key, int least) {
  const auto it = object.find(key);
  if (it == object.end() || !it->is_number_integer() || *it < least || *it > (1 << 30)) {
    return InvalidArgument("{} must be an integer >= {}", key, least);
  }
  return it->get<int>();
}

absl::StatusOr<BenchRow> ParseRow(const json& object) {
  BenchRow row;
  row.name = object.value("name", "");
  TANDEM_ASSIGN_OR_RETURN(row.sequences, Count(object, "sequences", 1));
  TANDEM_ASSIGN_OR_RETURN(row.start, Count(object, "start", 0));
  TANDEM_ASSIGN_OR_RETURN(row.tokens, Count(object, "tokens", 1));
  TANDEM_ASSIGN_OR_RETURN(row.chunk, Count(object, "chunk", 1));
  TANDEM_ASSIGN_OR_RETURN(const double ms, Number(object, "ms"));
  row.seconds = ms / 1e3;
  return row;
}

}  // namespace

void StepShape::Add(int start, int num_tokens, bool draw) {
  const int64_t n = num_tokens;
  rows += num_tokens;
  draws += draw ? 1 : 0;
  if (n == 1) {
    decode_positions += start + 1;
  } else {
    chunk_pairs += n * start + n * (n + 1) / 2;
  }
}

const std::vector<Quantisation>& Quantisations() {
  static const auto* const all = new std::vector<Quantisation>{
      {"fp32", 4, DType::kFloat32},
      {"bf16", 2, DType::kBFloat16},
      {"int8", 1 + 2 / 4096.0, DType::kBFloat16},
      {"int4", 0.5 + 2.5 / 128, DType::kBFloat16},
  };
  return *all;
}

const Quantisation* FindQuantisation(const std::string& name) {
  for (const Quantisation& quantisation : Quantisations()) {
    if (quantisation.name == name) return &quantisation;
  }
  return nullptr;
}

ModelWork::ModelWork(const ModelConfig& config, const Quantisation& quantisation,
                     std::optional<DType> kv_dtype) {
  const double hidden = config.hidden_size,
               queries = double{1} * config.num_heads * config.head_dim,
               keys = double{1} * config.num_kv_heads * config.head_dim;
  const double element = static_cast<double>(DTypeSize(quantisation.activations));
  num_layers_ = config.num_layers;
  layer_weights_ =
      config.num_layers * (2 * hidden * (queries + keys) + 3 * hidden * config.intermediate_size);
  head_weights_ = hidden * config.vocab_size;
  layer_bytes_ = layer_weights_ * quantisation.bytes_per_weight;
  head_bytes_ = head_weights_ * element;
  flops_per_pair_ = 4 * config.num_layers * queries;
  const double others = static_cast<double>(config.NumParameters()) - layer_weights_;
  weight_bytes_ = static_cast<int64_t>(layer_bytes_ + others * element);
  kv_bytes_per_token_ = static_cast<int64_t>(
      config.LayoutFor(16, kv_dtype.value_or(quantisation.activations)).BytesPerToken());
}

Slowdown SlowdownOf(const Host& host, int workers, double read_bytes_per_second) {
  Slowdown slowdown;
  if (host.cores == 0) return slowdown;
  slowdown.compute = std::max(1.0, double{1} * workers * host.threads / host.cores);
  slowdown.read = slowdown.compute;
  if (host.read_bytes_per_second > 0) {
    slowdown.read =
        std::max(slowdown.read, workers * read_bytes_per_second / host.read_bytes_per_second);
  }
  return slowdown;
}

Derates MeasuredDerates() { return {0.80, 0.70, 0.62, 0.1e-3}; }

absl::StatusOr<Bench> ParseBench(const std::string& text) {
  const json object = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!object.is_object()) return InvalidArgument("must be a JSON object");
  Bench bench;
  TANDEM_ASSIGN_OR_RETURN(bench.card.read_bytes_per_second,
                          Number(object, "read_bytes_per_second"));
  TANDEM_ASSIGN_OR_RETURN(bench.card.flops, Number(object, "matmul_flops"));
  const auto model = object.find("model");
  if (model == object.end() || !model->is_object()) {
    return InvalidArgument("model must be a config.json as an object");
  }
  TANDEM_ASSIGN_OR_RETURN(bench.model, ModelConfig::Parse(model->dump(), "model"));
  const Quantisation* quantisation = FindQuantisation(object.value("quantisation", ""));
  if (quantisation == nullptr) {
    return InvalidArgument("quantisation must be one of fp32, bf16, int8, int4");
  }
  bench.quantisation = *quantisation;
  if (object.contains("threads")) {
    TANDEM_ASSIGN_OR_RETURN(bench.threads, Count(object, "threads", 1));
    TANDEM_ASSIGN_OR_RETURN(bench.host_read_bytes_per_second,
                            Number(object, "host_read_bytes_per_second"));
  }
  const auto rows = object.find("rows");
  if (rows == object.end() || !rows->is_array()) return InvalidArgument("rows must be a list");
  for (const json& row : *rows) {
    // Some rows time other things: starting, the host, a mixed load.
    if (!row.is_object() || !row.contains("sequences")) continue;
    absl::StatusOr<BenchRow> parsed = ParseRow(row);
    if (!parsed.ok()) {
      return InvalidArgument("rows[{}]: {}", bench.rows.size(), MessageOf(parsed.status()));
    }
    bench.rows.push_back(*std::move(parsed));
  }
  if (bench.rows.empty()) return InvalidArgument("rows has none with sequences, start and tokens");
  return bench;
}

CostModel::CostModel(const Card& card, const Derates& derates)
    : seconds_per_{derates.fixed_seconds, 1 / (card.read_bytes_per_second * derates.read),
                   1 / (card.read_bytes_per_second * derates.read),
                   1 / (card.flops * derates.product), 1 / (card.flops * derates.attention)} {}

CostModel CostModel::Fit(const Bench& bench, const CostModel& prior) {
  // In units of the prior's terms and of what each row took, so that all errors are relative.
  const ModelWork model(bench.model, bench.quantisation);
  std::array<Terms, kTerms> squares = {};
  Terms targets = {};
  const auto add = [&](const Terms& x, double weight) {
    for (size_t i = 0; i < kTerms; ++i) {
      for (size_t j = 0; j < kTerms; ++j) squares[i][j] += weight * x[i] * x[j];
      targets[i] += weight * x[i];
    }
  };
  for (const BenchRow& row : bench.rows) {
    Terms x = TermsOf(model, row);
    for (size_t i = 0; i < kTerms; ++i) x[i] *= prior.seconds_per_[i] / row.seconds;
    add(x, 1);
  }
  for (size_t i = 0; i < kTerms; ++i) {
    Terms unit = {};
    unit[i] = 1;
    add(unit, kPull);
  }
  Terms scale;
  scale.fill(1);
  for (int sweep = 0; sweep < kSweeps; ++sweep) {
    for (size_t i = 0; i < kTerms; ++i) {
      double rest = targets[i];
      for (size_t j = 0; j < kTerms; ++j) {
        if (j != i) rest -= squares[i][j] * scale[j];
      }
      scale[i] = std::max(0.0, rest / squares[i][i]);
    }
  }
  CostModel fitted = prior;
  for (size_t i = 0; i < kTerms; ++i) fitted.seconds_per_[i] *= scale[i];
  return fitted;
}

CostModel::Terms CostModel::TermsOf(const ModelWork& model, const StepShape& step) {
  const double rows = step.rows, draws = step.draws;
  return {
      1.0, model.layer_bytes_ + (step.draws > 0 ? model.head_bytes_ : 0),
      static_cast<double>(model.kv_bytes_per_token_) * static_cast<double>(step.decode_positions),
      2 * (model.layer_weights_ * rows + model.head_weights_ * draws),
      model.flops_per_pair_ * static_cast<double>(step.chunk_pairs)};
}

CostModel::Terms CostModel::TermsOf(const ModelWork& model, const BenchRow& row) {
  Terms sum = {};
  for (int done = 0; done < row.tokens; done += row.chunk) {
    const int tokens = std::min(row.chunk, row.tokens - done);
    StepShape step;
    for (int i = 0; i < row.sequences; ++i) {
      step.Add(row.start + done, tokens, done + tokens == row.tokens);
    }
    const Terms terms = TermsOf(model, step);
    for (size_t i = 0; i < kTerms; ++i) sum[i] += terms[i];
  }
  return sum;
}

double CostModel::Sum(const Terms& terms) const {
  double sum = 0;
  for (size_t i = 0; i < kTerms; ++i) sum += seconds_per_[i] * terms[i];
  return sum;
}

double CostModel::Seconds(const ModelWork& model, const StepShape& step,
                          const Slowdown& slowdown) const {
  Terms terms = TermsOf(model, step);
  for (const size_t i : {1, 2}) terms[i] *= slowdown.read;
  for (const size_t i : {0, 3, 4}) terms[i] *= slowdown.compute;
  return Sum(terms);
}

double CostModel::Seconds(const ModelWork& model, const BenchRow& row) const {
  return Sum(TermsOf(model, row));
}

Derates CostModel::SharesOf(const Card& card) const {
  // One share for weights and KV: a data sheet has one figure for both.
  return {1 / (seconds_per_[1] * card.read_bytes_per_second), 1 / (seconds_per_[3] * card.flops),
          1 / (seconds_per_[4] * card.flops), seconds_per_[0]};
}

}  // namespace tandem::simulation
