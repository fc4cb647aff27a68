#include "engine/model/fp8_weights.h"

#include "engine/kernels/fp8_rows.h"

namespace tandem::engine {

bool IsFp8Weight(std::string_view tensor) { return tensor.ends_with("_proj.weight"); }

TensorView RoundToFp8(const TensorView& view, Threads* threads, MemoryBlock* memory) {
  const auto rows = static_cast<size_t>(view.shape[0]), inputs = static_cast<size_t>(view.shape[1]);
  const size_t row_bytes = inputs * ElementSize(view.element);
  const size_t bytes = rows * inputs * sizeof(uint16_t);
  if (memory->size() < bytes) *memory = MemoryBlock(bytes);
  auto* out = static_cast<uint16_t*>(memory->data());
  threads->ForRanges(rows, 1 + 65536 / inputs, [&](size_t begin, size_t end) {
    for (size_t row = begin; row < end; ++row) {
      const std::byte* from = view.data + row * row_bytes;
      const float scale = Fp8Scale(LargestSize(from, view.element, inputs));
      for (size_t i = 0; i < inputs; ++i) {
        out[row * inputs + i] = FloatToBF16(RoundToFp8(LoadElement(from, view.element, i), scale));
      }
    }
  });
  return {Element::kBFloat16, view.shape, static_cast<const std::byte*>(memory->data()), bytes};
}

}  // namespace tandem::engine
