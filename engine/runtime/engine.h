// A loaded model with its KV pool: everything a worker loop drives, built from flags.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

#include "common/base/kv_layout.h"
#include "common/base/model_config.h"
#include "engine/kv/block_pool.h"
#include "engine/kv/prefix_cache.h"
#include "engine/runtime/model_runner.h"

namespace tandem::engine {

// Mirrors the flags of the same names; units in comments.
struct EngineOptions {
  std::string model_dir;
  std::string load_format = "auto";     // auto, dummy
  std::string device = "auto";          // of backend.h; auto: the best there is
  std::string dtype = "auto";           // auto: bfloat16 where the device has it; float32, bfloat16
  std::string kv_cache_dtype = "auto";  // auto: that of the weights; fp8
  std::string quantization = "auto";    // of weights. auto: the checkpoint's; fp8: made of others
  int block_size = 16;                  // tokens
  int max_model_len = 0;                // tokens; 0: as long as the model allows and the pool holds
  int max_num_batched_tokens = 0;       // per step; 0: the device's default (backend.h)
  int max_num_seqs = 0;                 // per step; 0: the device's default
  int gpu = 0;                          // its number among those that the process may see
  std::string devices;  // the GPU of each rank, as "0,1"; "": `gpu` and those behind it
  double gpu_memory_utilization = 0.9;  // of a GPU's whole memory, for this process
  int64_t kv_cache_memory_bytes = 0;    // 0: chosen from the memory available
  bool enable_prefix_caching = true;
  bool pad_query_heads = false;  // padded_heads.h
  int tensor_parallel_size = 1;  // ranks (tensor_parallel.h)
  // A sequence's tokens do not depend on its company, its chunks, or where it was computed. Costs
  // speed on a GPU; a CPU in float32 is always so.
  bool batch_invariant = false;
  bool enforce_eager = false;  // no recorded steps (DecoderRunner::RecordDecodeSteps)
  double min_step_ms = 0;      // a step takes no less (paced_runner.h)
  uint64_t seed = 0;           // of dummy weights
  std::string shared_weights;  // memory to share with other workers of the host; "": none
  int num_threads = 0;         // of the CPU, to compute or to load with; 0: one per physical core
  // How far loading is goes to stdout too, for who started this process (load_progress.h).
  bool report_loading = false;
  // Token ids from here on are padding rows of the embedding and never drawn. 0: one more than the
  // largest id in MODEL_DIR/tokenizer.json; where that is absent, the whole vocabulary is valid.
  int valid_vocab_size = 0;
};

// Owned and used by the worker's loop thread; config(), layout(), region() and digests are constant
// after Load.
class Engine {
 public:
  // Errors name the flag, the limit and the largest value that would fit.
  static absl::StatusOr<std::unique_ptr<Engine>> Load(const EngineOptions& options);
  virtual ~Engine() = default;

  virtual const EngineOptions& options() const = 0;  // resolved: no autos left
  virtual const ModelConfig& config() const = 0;
  virtual const std::string& model_digest() const = 0;
  // The pool, with all KV heads. With several ranks it lies in as many pieces, and this is its
  // shape alone, without memory.
  virtual KvRegion region() const = 0;
  // The pieces, in the order of their heads.
  virtual std::vector<KvRegion> regions() const { return {region()}; }
  virtual BlockPool& pool() = 0;
  virtual PrefixCache& cache() = 0;
  virtual ModelRunner& runner() = 0;
  // Start-up banner: model, dtype, blocks, KV bytes per token, maximum concurrency at
  // max_model_len.
  virtual std::string Banner() const = 0;
};

}  // namespace tandem::engine
