// Moved; to go once nobody includes it from here.
#pragma once
#include "simulation/cluster.h"  // IWYU pragma: export
