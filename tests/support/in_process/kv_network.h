// Moved; to go once nobody includes it from here.
#pragma once
#include "simulation/kv_network.h"  // IWYU pragma: export
