// Moved; to go once nobody includes it from here.
#pragma once
#include "simulation/fake_clock.h"  // IWYU pragma: export
