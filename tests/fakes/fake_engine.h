// Moved; to go once nobody includes it from here.
#pragma once
#include "simulation/fake_engine.h"  // IWYU pragma: export
