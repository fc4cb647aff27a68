#include "common/rpc/server.h"

#include <csignal>
#include <string>
#include <string_view>
#include <utility>

#include "absl/base/call_once.h"
#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "google/protobuf/stubs/logging.h"
#include "grpc/support/log.h"
#include "grpcpp/ext/proto_server_reflection_plugin.h"
#include "grpcpp/impl/server_builder_option.h"
#include "grpcpp/impl/server_builder_plugin.h"
#include "grpcpp/impl/server_initializer.h"
#include "grpcpp/resource_quota.h"
#include "spdlog/spdlog.h"

#include "common/base/host_port.h"
#include "common/base/status.h"
#include "common/rpc/connection_bound.h"
#include "common/rpc/health_service.h"
#include "common/rpc/public_server.h"

namespace tandem {
namespace {

// Ping after this time of silence, and the time to answer. A program that uses gRPC's blocking
// calls answers only while it is inside of one, or every 5 s (gRPC's backup poller): who must be
// patient with such peers, or is one, takes the patient values.
struct Keepalive {
  int time_ms;
  int timeout_ms;
};
constexpr Keepalive kEager = {1000, 1000};
constexpr Keepalive kPatient = {10'000, 20'000};
constexpr int kMaxMessageBytes = 64 << 20;
// For TLS; gRPC's own bound is 2 minutes.
constexpr int kHandshakeTimeoutMs = 5000;
// A connection without calls; its client dials again with the next one.
constexpr int kMaxIdleMs = 10 * 60 * 1000;

// The only way to learn the names of the services of a built server (also of those that gRPC's
// plugins add) is a plugin.
class ServiceNames : public grpc::ServerBuilderPlugin {
 public:
  explicit ServiceNames(std::shared_ptr<HealthService> health) : health_(std::move(health)) {}

  std::string name() override { return "tandem_service_names"; }
  void InitServer(grpc::ServerInitializer* /*init*/) override {}
  void Finish(grpc::ServerInitializer* init) override {
    health_->SetServices(*init->GetServiceList());
  }
  void ChangeArguments(const std::string& /*name*/, void* /*value*/) override {}

 private:
  const std::shared_ptr<HealthService> health_;
};

// gRPC's own lines say at length what our statuses say in one: they go to the debug log, unless
// they are gRPC's last words.
void LogGrpcLine(gpr_log_func_args* line) {
  const std::string_view message = line->message;
  if (message.find("assertion failed") != message.npos) {
    spdlog::critical("grpc: {}:{}: {}", line->file, line->line, message);
  } else {
    spdlog::debug("grpc: {}", message);
  }
}

// protobuf writes to stderr for each message that a stranger gets wrong; the status says so too.
void LogProtobufLine(google::protobuf::LogLevel level, const char* /*file*/, int /*line*/,
                     const std::string& message) {
  spdlog::log(
      level == google::protobuf::LOGLEVEL_FATAL ? spdlog::level::critical : spdlog::level::debug,
      "protobuf: {}", message);
}

// A server without an address that is never stopped. The callback API's threads and queue are
// shared by all channels and servers of the process; gRPC 1.51 takes them down with the last of
// these and may abort doing so, while another thread still takes its last event from the queue.
// With this one they live as long as the process.
void KeepCallbackThreads() {
  static auto* service = new grpc::health::v1::Health::CallbackService;
  static grpc::Server* server [[maybe_unused]] = [] {
    grpc::ServerBuilder builder;
    builder.RegisterService(service);
    return builder.BuildAndStart().release();
  }();
}

void PrepareGrpcOnce() {
  [[maybe_unused]] static const bool done = [] {
    gpr_set_log_function(LogGrpcLine);
    google::protobuf::SetLogHandler(LogProtobufLine);
    // The threads that gRPC starts here and keeps take no signals: a SIGCHLD or SIGTERM that they
    // took would be lost to whoever waits for it.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before);
    BoundConnections();
    grpc::EnableDefaultHealthCheckService(false);
    KeepCallbackThreads();  // before reflection is a part of every server
    grpc::reflection::InitProtoReflectionServerBuilderPlugin();
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return true;
  }();
}

class ServiceNamesOption : public grpc::ServerBuilderOption {
 public:
  explicit ServiceNamesOption(std::shared_ptr<HealthService> health) : health_(std::move(health)) {}

  void UpdateArguments(grpc::ChannelArguments* /*arguments*/) override {}
  void UpdatePlugins(std::vector<std::unique_ptr<grpc::ServerBuilderPlugin>>* plugins) override {
    plugins->push_back(std::make_unique<ServiceNames>(health_));
  }

 private:
  const std::shared_ptr<HealthService> health_;
};

class GrpcServer : public RpcServer {
 public:
  GrpcServer(std::shared_ptr<HealthService> health, std::shared_ptr<ServerTls> tls,
             std::shared_ptr<const ClusterCredentials> credentials)
      : health_(std::move(health)), tls_(std::move(tls)), credentials_(std::move(credentials)) {}
  ~GrpcServer() override { Shutdown(absl::ZeroDuration()); }

  void Init(std::unique_ptr<grpc::Server> server, HostPort address) {
    server_ = std::move(server);
    port_ = address.port;
    address_ = address.ToString();
  }

  int port() const override { return port_; }
  const std::string& address() const override { return address_; }
  void SetServing(bool serving) override { health_->SetServing(serving); }
  void Shutdown(absl::Duration grace) override {
    absl::MutexLock lock(&shutdown_mutex_);
    if (shut_down_ || server_ == nullptr) return;
    shut_down_ = true;
    health_->Shutdown();
    server_->Shutdown(absl::ToChronoTime(absl::Now() + grace));
    server_->Wait();
  }

 private:
  const std::shared_ptr<HealthService> health_;
  const std::shared_ptr<ServerTls> tls_;  // outlives server_
  // What server_ shows changes as long as these live.
  const std::shared_ptr<const ClusterCredentials> credentials_;
  std::unique_ptr<grpc::Server> server_;
  int port_ = 0;
  std::string address_;

  absl::Mutex shutdown_mutex_;  // two callers of Shutdown both return when it is done
  bool shut_down_ ABSL_GUARDED_BY(shutdown_mutex_) = false;
};

void AddServerArguments(const RpcServerOptions& options, grpc::ServerBuilder* builder) {
  // Without this a second process would share the port and get half of the connections.
  builder->AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  // Anyone's program may be the client.
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, kPatient.time_ms);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kPatient.timeout_ms);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  // Clients may ping as often as MakeChannel does, and are never sent away for it.
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 100);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MAX_PING_STRIKES, 0);
  builder->AddChannelArgument(GRPC_ARG_SERVER_HANDSHAKE_TIMEOUT_MS, kHandshakeTimeoutMs);
  builder->AddChannelArgument(GRPC_ARG_MAX_CONNECTION_IDLE_MS, kMaxIdleMs);
  builder->AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, options.max_streams_per_connection);
  grpc::ResourceQuota quota("tandem_server");
  quota.Resize(static_cast<size_t>(options.memory_bytes));
  builder->SetResourceQuota(quota);
  builder->SetMaxReceiveMessageSize(options.max_receive_bytes);
  builder->SetMaxSendMessageSize(-1);
}

// `tls` null: plain HTTP/2, unless `options` has credentials.
absl::StatusOr<std::unique_ptr<RpcServer>> StartServer(
    const RpcServerOptions& options, const std::shared_ptr<ServerTls>& tls,
    const std::vector<grpc::Service*>& services) {
  TANDEM_ASSIGN_OR_RETURN(HostPort address, ParseHostPort(options.listen_address));
  PrepareGrpcOnce();
  static absl::once_flag warned;
  absl::call_once(warned, WarnOfFewDescriptors);

  auto health = std::make_shared<HealthService>();
  auto server = std::make_unique<GrpcServer>(health, tls, options.credentials);
  grpc::ServerBuilder builder;
  AddServerArguments(options, &builder);
  builder.SetOption(std::make_unique<ServiceNamesOption>(health));
  int port = 0;
  std::shared_ptr<grpc::ServerCredentials> credentials = grpc::InsecureServerCredentials();
  if (options.credentials != nullptr) credentials = options.credentials->ForServer(options.callers);
  if (tls != nullptr) credentials = tls->Credentials();
  builder.AddListeningPort(address.ToString(), credentials, &port);
  builder.RegisterService(health.get());
  for (grpc::Service* service : services) builder.RegisterService(service);
  std::unique_ptr<grpc::Server> built = builder.BuildAndStart();
  if (built == nullptr) {
    return Unavailable("cannot listen on {}: {}", options.listen_address,
                       WhyCannotListen(options.listen_address));
  }
  address.port = port;
  server->Init(std::move(built), address);
  return std::unique_ptr<RpcServer>(std::move(server));
}

std::shared_ptr<grpc::Channel> MakeChannelWith(
    const std::string& address, const std::shared_ptr<grpc::ChannelCredentials>& credentials,
    Patience patience) {
  const Keepalive& keepalive = patience == Patience::kEager ? kEager : kPatient;
  grpc::ChannelArguments arguments;
  // Only while calls are running (the default): between calls nobody reads the answers to pings.
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, keepalive.time_ms);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, keepalive.timeout_ms);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1000);
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 2000);  // the time a connection may take
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  arguments.SetMaxReceiveMessageSize(kMaxMessageBytes);
  arguments.SetMaxSendMessageSize(-1);
  return grpc::CreateCustomChannel(address, credentials, arguments);
}

}  // namespace

absl::StatusOr<std::unique_ptr<RpcServer>> RpcServer::Start(
    const RpcServerOptions& options, const std::vector<grpc::Service*>& services) {
  return StartServer(options, nullptr, services);
}

absl::StatusOr<std::unique_ptr<RpcServer>> StartPublicServer(
    const RpcServerOptions& options, const std::shared_ptr<ServerTls>& tls,
    const std::vector<grpc::Service*>& services) {
  return StartServer(options, tls, services);
}

std::shared_ptr<grpc::Channel> MakeChannel(const std::string& address, Patience patience) {
  PrepareGrpcOnce();
  return MakeChannelWith(address, grpc::InsecureChannelCredentials(), patience);
}

std::shared_ptr<grpc::Channel> MakeChannel(const std::string& address,
                                           const ClusterCredentials& credentials,
                                           const Party& callee, Patience patience) {
  PrepareGrpcOnce();
  return MakeChannelWith(address, credentials.ForChannel(callee), patience);
}

std::shared_ptr<grpc::Channel> MakeChannel(const PublicServer& server, Patience patience) {
  if (!server.tls) return MakeChannel(server.address, patience);
  PrepareGrpcOnce();
  grpc::SslCredentialsOptions options;
  options.pem_root_certs = server.tls_ca;
  options.pem_cert_chain = server.tls_certificate;
  options.pem_private_key = server.tls_key;
  return MakeChannelWith(server.address, grpc::SslCredentials(options), patience);
}

bool Reached(const grpc::ClientContext& context) {
  // The address of the connection that took the call; without one, the channel's own target.
  const std::string peer = context.peer();
  return peer.starts_with("ipv4:") || peer.starts_with("ipv6:");
}

}  // namespace tandem
