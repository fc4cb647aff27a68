#include "common/base/checkpoint_files.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <system_error>
#include <utility>

#include "common/base/status.h"
#include "common/base/weight_files.h"

namespace tandem {
namespace {

constexpr size_t kLengthBytes = 8;  // of a header's length

absl::StatusOr<CheckpointFile> ReadHeader(const std::string& path, size_t shards) {
  std::error_code error;
  if (!std::filesystem::exists(path, error)) {
    return NotFound("{}: no such file{}", path,
                    shards > 1 ? fmt::format("; it is one of {} shards that "
                                             "model.safetensors.index.json names",
                                             shards)
                               : "");
  }
  if (!std::filesystem::is_regular_file(path, error)) {
    return InvalidArgument("{}: not a regular file", path);
  }
  CheckpointFile file{.path = path, .bytes = std::filesystem::file_size(path, error)};
  std::ifstream in(path, std::ios::binary);
  std::string beginning(std::min(kLengthBytes, file.bytes), '\0');
  const auto read = [&](size_t from) {
    in.read(beginning.data() + from, static_cast<std::streamsize>(beginning.size() - from));
    return !in.fail();
  };
  if (error || !in || !read(0)) return InvalidArgument("{}: cannot be read", path);
  TANDEM_ASSIGN_OR_RETURN(
      const size_t data_begin,
      SafetensorsDataBegin(std::as_bytes(std::span(beginning)), file.bytes, path));
  beginning.resize(data_begin);
  if (!read(kLengthBytes)) return InvalidArgument("{}: cannot be read", path);
  TANDEM_ASSIGN_OR_RETURN(file.index,
                          ParseSafetensors(std::as_bytes(std::span(beginning)), file.bytes, path));
  return file;
}

}  // namespace

absl::StatusOr<CheckpointFiles> CheckpointFiles::Read(const std::string& model_dir) {
  TANDEM_ASSIGN_OR_RETURN(const WeightFiles listed, ListWeightFiles(model_dir));
  CheckpointFiles out;
  for (const std::string& name : listed.names) {
    TANDEM_ASSIGN_OR_RETURN(CheckpointFile file,
                            ReadHeader(model_dir + "/" + name, listed.names.size()));
    for (const auto& [tensor, entry] : file.index) {
      if (!out.file_of.emplace(tensor, out.files.size()).second) {
        return InvalidArgument("{}: tensor \"{}\" is also in another shard", file.path,
                               PrintableName(tensor));
      }
    }
    out.files.push_back(std::move(file));
  }
  for (const auto& [tensor, file] : listed.file_of) {
    const auto it = out.file_of.find(tensor);
    if (it == out.file_of.end() || out.files[it->second].path != model_dir + "/" + file) {
      return InvalidArgument("{}: tensor \"{}\" is not in {}, where the index says", model_dir,
                             PrintableName(tensor), file);
    }
  }
  return out;
}

}  // namespace tandem
