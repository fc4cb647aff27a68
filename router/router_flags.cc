#include "router/router_flags.h"

#include "common/config/dtype_choices.h"
#include "common/config/log_flags.h"
#include "common/rpc/cluster_flags.h"

namespace tandem::router {

void AddRouterFlags(FlagSet* set, RouterFlags* flags) {
  set->Group("Model");
  set->Add("--model", &flags->model, "model directory (config.json, tokenizer.json, ...)");
  set->Add("--served-model-name", &flags->served_model_name,
           "name that clients ask for; default: the name of the model directory, or ORG/NAME of "
           "the Hugging "
           "Face cache");
  set->AddChoice(
      "--load-format", &flags->load_format, {"auto", "dummy"},
      "what workers must hold. auto: the weights in --model; dummy: random ones of --seed");
  set->Add("--seed", &flags->seed, "seed of the workers' dummy weights");
  set->Add(
      "--model-digest", &flags->model_digest,
      "digest of the weights that workers must hold (their logs say it), for a --model without "
      "weights");
  set->AddChoice("--dtype", &flags->dtype, kDTypeChoices,
                 "what workers must compute in; auto: what the first one does");
  set->AddChoice("--kv-cache-dtype", &flags->kv_cache_dtype, kKvCacheDTypeChoices,
                 "what workers must keep KV in; auto: --dtype, and where that is auto what the "
                 "first one does");
  set->AddChoice("--quantization", &flags->quantization, kQuantizationChoices,
                 "what workers must round weights to; auto: what the first one does");
  set->Add("--block-size", &flags->block_size,
           "the workers' KV block size; 0: what the first one has", "tokens");
  set->Group("Network");
  set->Add("--listen", &flags->listen, "address of the public API; port 0: any", "HOST:PORT");
  set->Add("--internal-listen", &flags->internal_listen,
           "address for workers and operators, who prove the cluster secret; port 0: any",
           "HOST:PORT");
  AddMetricsFlags(set, &flags->metrics);
  set->Add("--health-listen", &flags->health_listen,
           "address that answers grpc.health.v1 to anyone, without TLS, for probes; empty: none",
           "HOST:PORT");
  AddClusterFlags(set, &flags->cluster_secret, &flags->cluster_tls);
  set->Group("Clients");
  set->Add(
      "--api-keys-file", &flags->api_keys_file,
      "YAML or JSON list of the API keys that clients must have one of (`tandem key new` makes "
      "entries); read again when it changes; default: no key is needed",
      "path");
  set->Add(
      "--tls-cert", &flags->tls_cert,
      "PEM file of the certificate that the public API shows, and of those that lead to its CA; "
      "read again when it changes; default: plain HTTP/2",
      "path");
  set->Add("--tls-key", &flags->tls_key, "PEM file of its key", "path");
  set->Add(
      "--tls-client-ca", &flags->tls_client_ca,
      "PEM file of the CA whose certificates clients must have one of; default: they need none",
      "path");
  set->Add("--insecure", &flags->insecure,
           "other hosts may use the public API without key and TLS, where --listen lets them");
  set->Group("Limits");
  set->Add("--normalize-prompts", &flags->normalize_prompts,
           "make trivially different prompts equal (NFC, line ends, trailing blanks)");
  set->Add("--max-queued-requests", &flags->max_queued_requests,
           "requests that may wait; more are refused", "requests");
  set->Add("--max-queued-tokens", &flags->max_queued_tokens,
           "prompt tokens of the requests that may wait; more are refused", "tokens");
  set->Add("--max-streams", &flags->max_streams, "streams open at once; more are refused",
           "streams");
  set->Add("--max-streams-per-connection", &flags->max_streams_per_connection,
           "streams at once on one client connection; its further ones wait in the client",
           "streams");
  set->AddBytes("--rpc-memory-bytes", &flags->rpc_memory_bytes,
                "what all client connections together may hold of messages and buffers");
  set->Add(
      "--max-priority", &flags->max_priority,
      "classes of priority that clients may ask for, up and down; each is worth 5 s of waiting",
      "classes");
  set->AddBytes("--max-prompt-bytes", &flags->max_prompt_bytes, "largest prompt as text");
  set->Add("--max-model-len", &flags->max_model_len,
           "longest prompt and answer together; 0: the model's, or what the workers hold",
           "tokens");
  set->Add("--migrate", &flags->migrate,
           "a stream whose decode worker is lost or drained goes on at another one");
  set->Group("Timeouts");
  set->Add("--queue-timeout", &flags->queue_timeout, "longest wait for room at a worker", "s");
  set->Add("--max-wait", &flags->max_wait,
           "a request whose turn would come later, as far as can be told, is refused at once", "s");
  set->Add("--no-worker-timeout", &flags->no_worker_timeout, "longest wait for a worker to join",
           "s");
  set->Add("--request-timeout", &flags->request_timeout,
           "longest time of a request, and deadline of those whose client gives none", "s");
  set->Add("--drain-timeout", &flags->drain_timeout,
           "how long running streams may go on after SIGTERM", "s");
  set->Add(
      "--worker-stalled-after", &flags->worker_stalled_after,
      "a worker that makes no progress for so long gets no request, and keeps none without a token",
      "s");
  set->Add("--worker-lost-after", &flags->worker_lost_after,
           "what runs at a worker that makes no progress for so long goes on elsewhere", "s");
  AddTraceFlags(set, &flags->trace);
  set->Add("--trace-sample-ratio", &flags->trace_sample_ratio,
           "of requests whose client sends no traceparent, the part that is traced, 0 to 1; the "
           "others as theirs says");
  AddLogFlags(set, &flags->log);
}

}  // namespace tandem::router
