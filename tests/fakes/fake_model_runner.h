// Moved; to go once nobody includes it from here.
#pragma once
#include "simulation/fake_model_runner.h"  // IWYU pragma: export
