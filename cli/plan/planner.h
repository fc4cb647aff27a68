// Which split of some cards serves a traffic best, by simulation.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "cli/bench/metrics.h"
#include "simulation/serving.h"

namespace tandem::cli {

// All that a plan depends on.
struct PlanTask {
  std::string model_name;
  simulation::ModelWork model;
  std::string quantisation;
  simulation::Card card;
  int cards = 1;
  simulation::CostModel cost;
  std::string cost_source;  // for people: where the cost model comes from
  simulation::WorkerPlan worker;
  simulation::Traffic traffic;
  double traffic_rate = 1;             // req/s, of the traffic as it is
  std::optional<double> request_rate;  // to show; unset: a share of what the best split sustains
  size_t left_out = 0;                 // requests of a trace that are too long
  Goodput limits;
  bool search = true;  // for the largest rate that each split sustains
};

struct SplitFigures {
  simulation::Split split;
  // The largest rate, req/s, at which kGoodShare of the requests stay within the limits; 0: none.
  double sustains = 0;
  // At PlanResult::rate.
  BenchMetrics metrics;
  double good_share = 0;
  double requests_per_second = 0;
  double tokens_per_second = 0;
  double prefill_busy = 0;    // share of the time
  double answers_a_card = 0;  // that a card which decodes draws at once, in the mean
};
inline constexpr double kGoodShare = 0.95;

struct PlanResult {
  double rate = 0;  // req/s
  std::vector<SplitFigures> splits;
  size_t best = 0;
  std::string why;  // one sentence
};

// Hears what is simulated: "2P2D at 3.2 req/s, 120 of 300".
using PlanProgress = std::function<void(const std::string&)>;
PlanResult FindBestSplit(const PlanTask& task, const PlanProgress& progress);

}  // namespace tandem::cli
