#include "engine/kernels/cpu/linear.h"

#include <algorithm>

#include "engine/kernels/cpu/linear_internal.h"

namespace tandem::engine {
namespace {

size_t RoundUp(size_t value, size_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Inputs handled per pass over a panel's columns: the piece of the panel they fill stays in the
// first-level cache.
constexpr size_t kPackInputs = 64;

// Kernels may keep rounded inputs in whole tiles of so many rows, and widened to float32.
constexpr size_t kRowTile = 16;

size_t Panels(const PackedMatrix& w) { return RoundUp(w.n, kPanel) / kPanel; }

// Below some 100k multiply-adds per member, waking it costs more than it saves.
size_t PanelGrain(const LinearArgs& args) {
  return 1 + 100000 / (args.rows * args.w->k * kPanel + 1);
}

void PackPanel(const void* source, Element source_element, size_t rows, size_t k,
               size_t first_column, Element packed_element, void* packed, size_t panel) {
  const size_t begin = std::max(first_column, panel * kPanel);
  const size_t end = std::min(first_column + rows, (panel + 1) * kPanel);
  for (size_t i0 = 0; i0 < k; i0 += kPackInputs) {
    const size_t i1 = std::min(k, i0 + kPackInputs);
    for (size_t column = begin; column < end; ++column) {
      const size_t row = column - first_column, lane = column - panel * kPanel;
      if (packed_element == Element::kFloat32) {
        float* out = static_cast<float*>(packed) + panel * kPanel * k + lane;
        for (size_t i = i0; i < i1; ++i) {
          out[i * kPanel] = LoadElement(source, source_element, row * k + i);
        }
      } else {
        uint16_t* out =
            static_cast<uint16_t*>(packed) + panel * kPanel * PaddedInputs(k) + lane * 2;
        for (size_t i = i0; i < i1; ++i) {
          out[(i / 2) * (2 * kPanel) + i % 2] =
              FloatToBF16(LoadElement(source, source_element, row * k + i));
        }
      }
    }
  }
}

}  // namespace

size_t PackedBytes(Element element, size_t n, size_t k) {
  const size_t inputs = element == Element::kFloat32 ? k : PaddedInputs(k);
  return RoundUp(n, kPanel) * inputs * ElementSize(element);
}

void PackRows(const void* source, Element source_element, size_t rows, size_t k,
              size_t first_column, Element packed_element, void* packed, Threads* threads) {
  const size_t first = first_column / kPanel;
  const size_t last = RoundUp(first_column + rows, kPanel) / kPanel;
  threads->ForRanges(last - first, 4, [&](size_t begin, size_t end) {
    for (size_t panel = first + begin; panel < first + end; ++panel) {
      PackPanel(source, source_element, rows, k, first_column, packed_element, packed, panel);
    }
  });
}

size_t LinearScratchBytes(Element element, size_t rows, size_t k) {
  if (element == Element::kFloat32) return 0;
  return RoundUp(rows, kRowTile) * PaddedInputs(k) * sizeof(float);
}

void LinearBF16(const BF16Kernel& kernel, const LinearArgs& args, void* scratch, Threads* threads) {
  threads->ForRanges(args.rows, 1 + 32768 / args.w->k, [&](size_t begin, size_t end) {
    kernel.round_rows(args, begin, end, scratch);
  });
  threads->ForRanges(Panels(*args.w), PanelGrain(args),
                     [&](size_t begin, size_t end) { kernel.panels(args, scratch, begin, end); });
}

void Linear(const PackedMatrix& w, const float* bias, const float* x, size_t x_stride, size_t rows,
            float* y, size_t y_stride, void* scratch, Threads* threads) {
  const LinearArgs args{&w, bias, x, x_stride, rows, y, y_stride};
  if (w.element == Element::kBFloat16) {
    const BF16Kernel* amx = AmxBF16Kernel();
    LinearBF16(amx != nullptr ? *amx : *FastestAvx512BF16Kernel(), args, scratch, threads);
    return;
  }
  threads->ForRanges(Panels(w), PanelGrain(args),
                     [&](size_t begin, size_t end) { LinearFloat32Panels(args, begin, end); });
}

}  // namespace tandem::engine
