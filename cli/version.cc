// `tandem version`: what was built, and what this machine offers it.
#include <filesystem>
#include <fstream>

#include "absl/strings/ascii.h"
#include "fmt/format.h"
#include "fmt/ranges.h"
#include "grpcpp/grpcpp.h"
#include "nlohmann/json.hpp"

#include "cli/command.h"
#include "common/base/build_info.h"

namespace tandem::cli {
namespace {

// The value of the first line "NAME : VALUE" of a file of /proc.
std::string ProcValue(const std::string& path, const std::string& name) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    const size_t colon = line.find(':');
    if (colon == std::string::npos || !line.starts_with(name)) continue;
    return std::string(absl::StripAsciiWhitespace(line.substr(colon + 1)));
  }
  return "";
}

// Those that kernels are chosen by.
std::vector<std::string> CpuFeatures() {
  std::vector<std::string> out;
  const std::string flags = " " + ProcValue("/proc/cpuinfo", "flags") + " ";
  for (const char* feature :
       {"avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16"}) {
    if (flags.find(fmt::format(" {} ", feature)) != std::string::npos) out.emplace_back(feature);
  }
  return out;
}

std::vector<std::string> Gpus() {
  std::vector<std::string> out;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/driver/nvidia/gpus", error)) {
    out.push_back(ProcValue((entry.path() / "information").string(), "Model"));
  }
  return out;
}

}  // namespace

int RunVersion(const Arguments& arguments) {
  FlagSet flags("tandem version",
                "Prints the version, how this program was built, and what the machine has that it "
                "can use. Put this into reports of bugs.");
  bool json = false;
  flags.Add("--json", &json, "one JSON object instead of text");
  if (const auto exit_code = ParseOrExit(&flags, arguments)) return *exit_code;
  const BuildInfo build = GetBuildInfo();
  const std::string cpu = ProcValue("/proc/cpuinfo", "model name");
  const std::vector<std::string> features = CpuFeatures();
  const std::vector<std::string> gpus = Gpus();
  if (json) {
    const nlohmann::ordered_json out = {{"version", build.version},
                                        {"commit", build.commit},
                                        {"build_type", build.type},
                                        {"compiler", build.compiler},
                                        {"grpc", grpc::Version()},
                                        {"cuda", build.cuda},
                                        {"cpu", cpu},
                                        {"cpu_features", features},
                                        {"gpus", gpus}};
    fmt::print("{}\n", out.dump());
    return kExitOk;
  }
  fmt::print("{}", VersionText("tandem"));
  fmt::print("gRPC       {}\n", grpc::Version());
  fmt::print("CUDA       {}\n", build.cuda ? "built in" : "not built in: --device cpu only");
  fmt::print("CPU        {}\n", cpu);
  fmt::print("features   {}\n",
             features.empty() ? "none beyond x86-64" : fmt::format("{}", fmt::join(features, " ")));
  fmt::print("GPUs       {}\n", gpus.empty() ? "none that a driver knows of"
                                             : fmt::format("{}", fmt::join(gpus, ", ")));
  return kExitOk;
}

}  // namespace tandem::cli
