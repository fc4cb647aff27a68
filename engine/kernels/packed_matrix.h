// A weight in the form in which a device reads it.
#pragma once

#include <cstddef>

#include "engine/kernels/element.h"

namespace tandem::engine {

// Made by Ops::PackWeightRows; only the same ops know the form.
struct PackedMatrix {
  Element element = Element::kFloat32;  // kFloat32 or kBFloat16
  size_t n = 0;                         // output columns
  size_t k = 0;                         // input elements
  const void* data = nullptr;           // in memory of the device
};

}  // namespace tandem::engine
