#include "fmt/format.h"
#include "grpcpp/grpcpp.h"

#include "cli/command.h"

namespace tandem::cli {

int RunVersion(const Arguments& arguments) {
  FlagSet flags("tandem version", "Prints the version of this program.");
  if (const auto exit_code = ParseOrExit(&flags, arguments)) return *exit_code;
  fmt::print("tandem {} (gRPC {})\n", TANDEM_VERSION, grpc::Version());
  return kExitOk;
}

}  // namespace tandem::cli
