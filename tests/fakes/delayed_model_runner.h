// Moved; to go once nobody includes it from here.
#pragma once
#include "simulation/delayed_model_runner.h"  // IWYU pragma: export
