// The tensors of a model directory, mapped into memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

#include "common/base/safetensors.h"
#include "engine/kernels/element.h"
#include "engine/model/mapped_file.h"

namespace tandem::engine {

// Not owning: valid as long as what holds the data.
struct TensorView {
  Element element = Element::kFloat32;
  std::vector<int64_t> shape;
  const std::byte* data = nullptr;  // not necessarily aligned
  size_t bytes = 0;
  const MappedFile* file = nullptr;  // that holds `data`; null: it was made up, or lies elsewhere

  // Bytes from the beginning of `file` to `data`.
  size_t FileOffset() const { return static_cast<size_t>(data - file->bytes().data()); }
};

// As TensorView, of 32-bit integers.
struct IntTensorView {
  std::vector<int64_t> shape;
  const std::byte* data = nullptr;

  uint32_t at(size_t index) const {
    uint32_t value;
    std::memcpy(&value, data + index * sizeof(value), sizeof(value));
    return value;
  }
};

// All tensors of a model directory (common/base/checkpoint_files.h). Constant after Open; movable.
class Checkpoint {
 public:
  // As CheckpointFiles::Read.
  static absl::StatusOr<Checkpoint> Open(const std::string& model_dir);

  // NotFound names the tensor; InvalidArgument an element type that weights cannot have.
  absl::StatusOr<TensorView> Get(std::string_view name) const;
  // The same for a tensor of I32.
  absl::StatusOr<IntTensorView> GetInts(std::string_view name) const;
  bool Has(std::string_view name) const { return file_of_.contains(name); }
  std::vector<std::string> Names() const;
  size_t TotalBytes() const;
  // The files, in order of their names, for the model's digest.
  struct File {
    std::string path;
    MappedFile mapping;
    SafetensorsIndex index;
  };
  std::span<const File> files() const { return files_; }

 private:
  struct Found {
    const File* file;
    const SafetensorsEntry* entry;

    const std::byte* data() const { return file->mapping.bytes().data() + entry->begin; }
  };
  absl::StatusOr<Found> Find(std::string_view name) const;

  std::vector<File> files_;
  std::map<std::string, size_t, std::less<>> file_of_;  // tensor name -> index in files_
};

}  // namespace tandem::engine
