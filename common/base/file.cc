#include "common/base/file.h"

#include <filesystem>
#include <fstream>
#include <sstream>

#include "common/base/status.h"

namespace tandem {
namespace {

// Whether `path` is a GGUF file, or a directory with one and without a config.json.
bool HoldsGguf(const std::filesystem::path& path) {
  std::error_code error;
  if (path.extension() == ".gguf") return true;
  if (std::filesystem::exists(path / "config.json", error)) return false;
  for (const auto& entry : std::filesystem::directory_iterator(path, error)) {
    if (entry.path().extension() == ".gguf") return true;
  }
  return false;
}

}  // namespace

absl::StatusOr<std::string> ReadFile(const std::string& path, size_t max_bytes) {
  std::error_code error;
  if (!std::filesystem::exists(path, error)) return NotFound("{}: no such file", path);
  if (std::filesystem::is_directory(path, error)) {
    return InvalidArgument("{}: is a directory, a file is needed", path);
  }
  const auto size = std::filesystem::file_size(path, error);
  if (!error && size > max_bytes) {
    return InvalidArgument("{}: {} bytes, at most {} are read", path, size, max_bytes);
  }
  std::ifstream in(path, std::ios::binary);
  std::ostringstream out;
  out << in.rdbuf();
  if (!in) return InvalidArgument("{}: cannot be read", path);
  return std::move(out).str();
}

bool FileExists(const std::string& path) {
  std::error_code error;
  return std::filesystem::is_regular_file(path, error);
}

absl::Status CheckModelDir(const std::string& flag, const std::string& path) {
  std::error_code error;
  if (path.empty()) return InvalidArgument("{}: name a model directory", flag);
  if (!std::filesystem::exists(path, error)) {
    return NotFound("{}: {} does not exist; give a directory with config.json", flag, path);
  }
  if (HoldsGguf(path)) {
    return InvalidArgument(
        "{}: {}: GGUF weights are not supported; take the model's safetensors checkpoint, in bf16 "
        "or "
        "with 4-bit GPTQ or AWQ (gemm) weights",
        flag, path);
  }
  if (!std::filesystem::is_directory(path, error)) {
    return InvalidArgument("{}: {} is not a directory; give the directory that holds config.json",
                           flag, path);
  }
  return absl::OkStatus();
}

}  // namespace tandem
