#include "engine/runtime/engine_flags.h"

#include "common/config/dtype_choices.h"

namespace tandem::engine {

void AddEngineFlags(FlagSet* flags, EngineOptions* options) {
  flags->Group("Model");
  flags->Add("--model", &options->model_dir, "Model directory (Hugging Face layout)", "directory");
  flags->AddChoice("--load-format", &options->load_format, {"auto", "dummy"},
                   "auto: safetensors; dummy: random weights made from config.json and --seed");
  flags->Add("--seed", &options->seed, "Seed of dummy weights");
  flags->Add("--report-loading", &options->report_loading,
             "Print `loading DONE TOTAL`, in bytes, on stdout while the weights load");
  flags->Group("Compute");
  flags->Add("--device", &options->device,
             "Where to compute: cpu, cuda in a build that has it, or auto: the best there is");
  flags->AddChoice("--dtype", &options->dtype, kDTypeChoices,
                   "Type of weights, and of KV but for --kv-cache-dtype; auto: bfloat16 where the "
                   "device has it");
  flags->AddChoice("--quantization", &options->quantization, kQuantizationChoices,
                   "Of the layers' weights; auto: as the checkpoint has them; fp8: rounded to e4m3 "
                   "when they are loaded, with a scale for each row, embedding and head not; CPUs "
                   "only, where it saves nothing");
  flags->Add("--gpu", &options->gpu, "Number of the GPU, among those of CUDA_VISIBLE_DEVICES");
  flags->Add(
      "--tensor-parallel-size", &options->tensor_parallel_size,
      "Ranks that the model is split over, by heads; on a CPU they share the compute threads, "
      "on GPUs each has one");
  flags->Add("--devices", &options->devices,
             "GPU of each rank, among those of CUDA_VISIBLE_DEVICES; one may be named again, which "
             "is slow and for tests; empty: --gpu and those behind it",
             "0,1,...");
  flags->Add("--num-threads", &options->num_threads, "Compute threads; 0: one per physical core");
  flags->Add("--batch-invariant", &options->batch_invariant,
             "Same tokens whatever else is in the batch and however a prompt is cut; slower on a "
             "GPU, always so on a CPU in float32");
  flags->Add("--pad-query-heads", &options->pad_query_heads,
             "Let a power of two of query heads share each KV head, with zeros for those that the "
             "model lacks: the same output, in tiles that are full");
  flags->Add("--enforce-eager", &options->enforce_eager,
             "Launch each kernel of a decode step by itself instead of steps that were recorded as "
             "CUDA graphs: the same numbers, for experiments; GPUs only");
  flags->Add("--min-step-ms", &options->min_step_ms,
             "A forward pass takes no less, as that of a larger model would; for experiments",
             "ms");
  flags->Group("Batching");
  flags->Add("--max-model-len", &options->max_model_len,
             "Longest sequence, prompt and output; 0: as long as the model and the KV pool allow",
             "tokens");
  flags->Add("--max-num-batched-tokens", &options->max_num_batched_tokens,
             "Most tokens in one forward pass; 0: 512 on a CPU, 8192 on a GPU", "tokens");
  flags->Add("--max-num-seqs", &options->max_num_seqs,
             "Most sequences in one forward pass; 0: 64 on a CPU, 256 on a GPU");
  flags->Group("Memory");
  flags->Add("--block-size", &options->block_size, "KV block size: 16, 32, 64, 128 or 256",
             "tokens");
  flags->AddChoice(
      "--kv-cache-dtype", &options->kv_cache_dtype, kKvCacheDTypeChoices,
      "Type of KV; auto: that of --dtype; fp8: e4m3, a byte each, rounded to 4 bits of "
      "precision");
  flags->Add("--gpu-memory-utilization", &options->gpu_memory_utilization,
             "Share of a GPU's whole memory for this process; the KV pool takes what weights and "
             "workspaces leave of it");
  flags->AddBytes("--kv-cache-memory-bytes", &options->kv_cache_memory_bytes,
                  "Size of the KV pool; 0: chosen from the memory available");
  flags->Add("--shared-weights", &options->shared_weights,
             "Memory in which workers of one host keep one copy of the weights, made by `tandem "
             "up`: a memfd that can be sealed; CPU only",
             "/proc/PID/fd/N");
  flags->Add("--enable-prefix-caching", &options->enable_prefix_caching,
             "Keep computed KV blocks for prompts that begin alike");
}

}  // namespace tandem::engine
