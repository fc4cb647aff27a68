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

absl::StatusOr<Checkpoint::Found> Checkpoint::Find(std::string_view name) const {
  const auto it = file_of_.find(name);
  if (it == file_of_.end()) return NotFound("tensor \"{}\" is missing", name);
  const File& file = files_[it->second];
  return Found{&file, &file.index.find(name)->second};
}

absl::StatusOr<TensorView> Checkpoint::Get(std::string_view name) const {
  TANDEM_ASSIGN_OR_RETURN(const Found found, Find(name));
  const std::string& dtype = found.entry->dtype;
  TensorView view;
  if (dtype == "F32") {
    view.element = Element::kFloat32;
  } else if (dtype == "BF16") {
    view.element = Element::kBFloat16;
  } else if (dtype == "F16") {
    view.element = Element::kFloat16;
  } else {
    return InvalidArgument("{}: tensor \"{}\": dtype {} is not supported; F32, F16 and BF16 are",
                           found.file->path, name, dtype);
  }
  view.shape = found.entry->shape;
  view.data = found.data();
  view.bytes = found.entry->end - found.entry->begin;
  view.file = &found.file->mapping;
  return view;
}

absl::StatusOr<IntTensorView> Checkpoint::GetInts(std::string_view name) const {
  TANDEM_ASSIGN_OR_RETURN(const Found found, Find(name));
  if (found.entry->dtype != "I32") {
    return InvalidArgument("{}: tensor \"{}\": dtype {}, must be I32", found.file->path, name,
                           found.entry->dtype);
  }
  return IntTensorView{found.entry->shape, found.data()};
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
