// Reader of the safetensors format: 8 bytes little-endian header length, a JSON object that gives
// each tensor's dtype, shape and byte range, then the data. Whatever the bytes, parsing ends in
// tensors that lie inside the file or in a Status that names the file and the tensor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

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

struct SafetensorsEntry {
  std::string dtype;  // as in the file: F32, BF16, I64, ...
  std::vector<int64_t> shape;
  size_t begin = 0;  // bytes from the start of the file
  size_t end = 0;
};

using SafetensorsIndex = std::map<std::string, SafetensorsEntry, std::less<>>;

// Parses and checks a whole file's bytes. The tensors must fill the data part exactly, without
// gaps or overlaps, as the format demands. `origin` (the path) begins every error message.
absl::StatusOr<SafetensorsIndex> ParseSafetensors(std::span<const std::byte> file,
                                                  std::string_view origin);

// "[2, 3]"
std::string ShapeText(std::span<const int64_t> shape);

// All tensors of a model directory: model.safetensors, or the shards that
// model.safetensors.index.json names. Constant after Open; movable.
class Checkpoint {
 public:
  static absl::StatusOr<Checkpoint> Open(const std::string& model_dir);

  // NotFound names the tensor; InvalidArgument an element type that weights cannot have.
  absl::StatusOr<TensorView> Get(std::string_view name) const;
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
  std::vector<File> files_;
  std::map<std::string, size_t, std::less<>> file_of_;  // tensor name -> index in files_
};

}  // namespace tandem::engine
