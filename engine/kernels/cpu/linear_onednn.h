// The bfloat16 matrix product by oneDNN, for CPUs with AMX.
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine/kernels/cpu/linear_internal.h"

namespace tandem {

// Whether oneDNN would use AMX tiles on this CPU. Without them it computes with the same
// instruction as this project's own kernel, which then does everything.
bool OneDnnHasAmx();

// Computes output columns of panels [panel_begin, panel_end) for as many leading rows as its tiles
// of rows cover, and returns how many; the rest is the caller's. Runs on the calling thread alone.
// Thread-safe. `x`: [rows][padded].
size_t OneDnnPanels(const LinearArgs& args, const uint16_t* x, size_t padded, size_t panel_begin,
                    size_t panel_end);

}  // namespace tandem
