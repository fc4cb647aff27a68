// What tandem_router says of itself and its flags: to its own command line, and to `tandem up`,
// which hands them on.
#pragma once

#include <cstdint>
#include <string>

#include "common/base/log.h"
#include "common/config/flags.h"
#include "common/config/metrics_flags.h"
#include "common/config/trace_flags.h"
#include "common/rpc/cluster_flags.h"

namespace tandem::router {

inline constexpr char kRouterProgram[] = "tandem_router";
inline constexpr char kRouterSummary[] =
    "Takes requests and sends each to a decode and a prefill worker.";

// Mirrors the flags of the same names.
struct RouterFlags {
  std::string model;
  std::string served_model_name;
  std::string model_digest;
  std::string load_format = "auto";
  uint64_t seed = 0;
  std::string dtype = "auto";
  std::string kv_cache_dtype = "auto";
  std::string quantization = "auto";
  int block_size = 16;
  std::string listen = "127.0.0.1:0";
  std::string internal_listen = "127.0.0.1:0";
  MetricsOptions metrics;
  std::string health_listen;
  std::string cluster_secret;
  TlsFiles cluster_tls;
  std::string api_keys_file;
  std::string tls_cert;
  std::string tls_key;
  std::string tls_client_ca;
  bool insecure = false;
  bool normalize_prompts = false;
  uint64_t max_queued_requests = 1024;
  uint64_t max_queued_tokens = 8 << 20;
  int max_streams = 4096;
  int max_streams_per_connection = 1024;
  int64_t rpc_memory_bytes = int64_t{1} << 30;
  int max_priority = 2;
  double queue_timeout = 60;
  double max_wait = 30;
  double no_worker_timeout = 5;
  double request_timeout = 600;
  double drain_timeout = 30;
  double worker_stalled_after = 3;
  double worker_lost_after = 10;
  bool migrate = true;
  int64_t max_prompt_bytes = 4 << 20;
  int max_model_len = 0;
  TraceOptions trace;
  double trace_sample_ratio = 1;
  LogOptions log;
};

// `flags` must live until the flags are parsed.
void AddRouterFlags(FlagSet* set, RouterFlags* flags);

}  // namespace tandem::router
