// A weight in the form in which a device reads it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine/kernels/element.h"

namespace tandem::engine {

// Made by Ops::PackWeightRows or Ops::PackInt4Rows; only the same ops know the form.
struct PackedMatrix {
  Element element = Element::kFloat32;  // kFloat32 or kBFloat16
  size_t n = 0;                         // output columns
  size_t k = 0;                         // input elements
  const void* data = nullptr;           // in memory of the device
  // Of weights with 4 bits: inputs that share a scale. 0: the weights are of `element`.
  size_t group_size = 0;
  // Of those: where input j of the packed form comes from, in memory of the device; null: from j.
  const int32_t* order = nullptr;
};

}  // namespace tandem::engine
