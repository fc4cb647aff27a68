// Fills memory of a device that does not share the host's with tensors of a checkpoint: several
// threads read parts of the files in large pieces into staging memory, each with a stream of its
// own, and the device fetches one piece while the next is read.
//
// First everything is announced, then read in the order of the files.
#pragma once

#include <cstddef>
#include <deque>
#include <optional>
#include <vector>

#include "absl/status/status.h"

#include "engine/device/device.h"
#include "engine/kernels/ops.h"
#include "engine/model/checkpoint.h"
#include "engine/model/load_progress.h"
#include "engine/model/quantised_linear.h"

namespace tandem::engine {

class WeightStager {
 public:
  // All outlive this.
  WeightStager(Device* device, Ops* ops) : device_(device), ops_(ops) {}

  // A matrix of `view.shape` [rows][k] of a file becomes columns [first_column, + rows) of `packed`
  // (Ops::PackWeightRows).
  void Pack(const TensorView& view, size_t first_column, void* packed);
  // The same with the weights of a quantised layer, which the threads dequantise.
  void Pack(QuantisedLinear linear, size_t first_column, void* packed);
  // The same as it is (Ops::PackInt4Rows), with its inputs in `order` (QuantisedLinear::Order).
  void PackInt4(QuantisedLinear linear, const Int4Shape& shape, std::vector<int32_t> order,
                size_t first_column, void* packed);
  // The bytes of `view` as they are.
  void Copy(const TensorView& view, void* to);

  size_t TotalBytes() const { return total_; }
  // Reads everything announced with at most `threads` threads, and waits until the device has it.
  // The files' views and the device's memory live until then. The first error of a disk, or
  // RESOURCE_EXHAUSTED where there is no staging memory.
  absl::Status Run(int threads, LoadProgress* progress);

 private:
  struct Quantised {
    QuantisedLinear linear;
    std::optional<Int4Shape> shape;  // none: dequantised
    std::vector<int32_t> order;
  };
  // Some rows of a tensor.
  struct Piece {
    const MappedFile* file = nullptr;
    size_t offset = 0;
    const Quantised* quantised = nullptr;  // or this, not a file,
    size_t first_row = 0;                  // from this row on
    size_t bytes = 0;                      // of staging memory
    size_t progress = 0;                   // of the checkpoint's bytes
    Element element = Element::kFloat32;
    size_t rows = 0, k = 0;
    size_t first_column = 0;
    void* packed = nullptr;  // or null:
    std::byte* copy = nullptr;
  };
  class Reader;

  void PackRows(const Quantised& quantised, size_t row_bytes, size_t first_column, void* packed);

  Device* const device_;
  Ops* const ops_;
  size_t total_ = 0;
  std::vector<Piece> pieces_;
  std::deque<Quantised> quantised_;  // of the pieces
};

}  // namespace tandem::engine
