// `tandem health`: one question to grpc.health.v1, for containers and scripts.
#include <cstdio>

#include "absl/status/statusor.h"
#include "absl/time/clock.h"
#include "fmt/format.h"
#include "grpc/health/v1/health.grpc.pb.h"

#include "cli/command.h"
#include "cli/server_flags.h"
#include "common/base/status.h"
#include "common/rpc/server.h"
#include "common/rpc/status.h"

namespace tandem::cli {
namespace {

using grpc::health::v1::Health;
using grpc::health::v1::HealthCheckRequest;
using grpc::health::v1::HealthCheckResponse;

absl::StatusOr<HealthCheckResponse::ServingStatus> Ask(const PublicServer& server,
                                                       absl::Duration timeout) {
  const auto stub = Health::NewStub(MakeChannel(server, Patience::kPatient));
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + timeout));
  HealthCheckResponse response;
  const grpc::Status status = stub->Check(&context, HealthCheckRequest(), &response);
  if (!status.ok()) return FromGrpcStatus(status);
  return response.status();
}

}  // namespace

int RunHealth(const Arguments& arguments) {
  FlagSet flags("tandem health",
                "Asks grpc.health.v1 whether a router, or a worker with --health-listen, takes "
                "work, and says it in one line. Exit code: 0 it does, 1 it does not or is not "
                "there, 2 a mistake in the flags.");
  ServerFlags server_flags;
  server_flags.AddTo(&flags);
  double timeout_s = 5;
  flags.Add("--timeout", &timeout_s, "longest wait for the answer", "s");
  PublicServer server;
  if (const auto exit_code = ParseOrExit(&flags, arguments, server_flags, &server)) {
    return *exit_code;
  }
  if (!(timeout_s > 0 && timeout_s <= 3600)) {
    fmt::print(stderr, "tandem health: --timeout must be more than 0 and at most 3600 s, got {}\n",
               timeout_s);
    return kExitUsage;
  }
  const auto answer = Ask(server, absl::Seconds(timeout_s));
  if (!answer.ok()) return Fail("health", answer.status(), server);
  fmt::print("{} {}\n", server.address, HealthCheckResponse::ServingStatus_Name(*answer));
  return *answer == HealthCheckResponse::SERVING ? kExitOk : kExitFailed;
}

}  // namespace tandem::cli
