#include "tests/support/paths.h"

#include <cstdlib>
#include <filesystem>

namespace tandem {
namespace {

std::string Env(const char* name, std::string fallback) {
  const char* value = std::getenv(name);
  return value != nullptr && *value != '\0' ? value : std::move(fallback);
}

}  // namespace

std::string SourcePath(const std::string& relative) {
  return Env("TANDEM_SOURCE_DIR", ".") + "/" + relative;
}

std::string BinaryPath(const std::string& name) {
  return Env("TANDEM_BIN_DIR", "build/release/bin") + "/" + name;
}

std::string SharedDir() {
  const std::string dir = Env("TANDEM_SHARED_DIR", SourcePath("../shared"));
  return std::filesystem::is_directory(dir + "/reference") ? dir : "";
}

}  // namespace tandem
