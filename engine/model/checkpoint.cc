#include "engine/model/checkpoint.h"

#include <utility>

#include "common/base/checkpoint_files.h"
#include "common/base/status.h"

namespace tandem::engine {

absl::StatusOr<Checkpoint> Checkpoint::Open(const std::string& model_dir) {
  TANDEM_ASSIGN_OR_RETURN(CheckpointFiles listed, CheckpointFiles::Read(model_dir));
  Checkpoint checkpoint;
  checkpoint.file_of_ = std::move(listed.file_of);
  for (CheckpointFile& file : listed.files) {
    TANDEM_ASSIGN_OR_RETURN(MappedFile mapping, MappedFile::Open(file.path));
    if (mapping.bytes().size() != file.bytes) {
      return InvalidArgument("{}: has {} bytes, and had {} a moment ago", file.path,
                             mapping.bytes().size(), file.bytes);
    }
    checkpoint.files_.push_back({std::move(file.path), std::move(mapping), std::move(file.index)});
  }
  return checkpoint;
}

absl::StatusOr<TensorView> Checkpoint::Get(std::string_view name) const {
  const auto it = file_of_.find(name);
  if (it == file_of_.end()) return NotFound("tensor \"{}\" is missing", name);
  const File& file = files_[it->second];
  const SafetensorsEntry& entry = file.index.find(name)->second;
  TensorView view;
  if (entry.dtype == "F32") {
    view.element = Element::kFloat32;
  } else if (entry.dtype == "BF16") {
    view.element = Element::kBFloat16;
  } else if (entry.dtype == "F16") {
    view.element = Element::kFloat16;
  } else {
    return InvalidArgument("{}: tensor \"{}\": dtype {} is not supported; F32, F16 and BF16 are",
                           file.path, name, entry.dtype);
  }
  view.shape = entry.shape;
  view.data = file.mapping.bytes().data() + entry.begin;
  view.bytes = entry.end - entry.begin;
  view.file = &file.mapping;
  return view;
}

std::vector<std::string> Checkpoint::Names() const {
  std::vector<std::string> names;
  for (const auto& [name, file] : file_of_) names.push_back(name);
  return names;
}

size_t Checkpoint::TotalBytes() const {
  size_t total = 0;
  for (const File& file : files_) total += file.mapping.bytes().size();
  return total;
}

}  // namespace tandem::engine
