// How a plan is shown. Pure.
#pragma once

#include <string>

#include "nlohmann/json.hpp"

#include "cli/plan/planner.h"

namespace tandem::cli {

std::string RenderPlan(const PlanTask& task, const PlanResult& result);
nlohmann::ordered_json PlanJson(const PlanTask& task, const PlanResult& result);

}  // namespace tandem::cli
