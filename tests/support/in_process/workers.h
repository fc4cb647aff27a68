// Moved; to go once nobody includes it from here.
#pragma once
#include "simulation/workers.h"  // IWYU pragma: export
