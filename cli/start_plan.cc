#include "cli/start_plan.h"

#include <algorithm>
#include <limits>

#include "absl/strings/str_join.h"

#include "cli/table.h"
#include "common/base/status.h"
#include "common/config/bytes.h"

namespace tandem::cli {
namespace {

// A process with its code, threads and connections, before it has done anything.
constexpr size_t kProcessBytes = size_t{48} << 20;
// Of what is available at the start, for one pool whose size nobody gave, as a worker alone would
// choose it; and of what is left when all else has its place, for all pools together.
constexpr double kPoolShare = 0.2;
constexpr double kLeftShare = 0.9;

std::string Size(size_t bytes) { return FormatBytes(static_cast<int64_t>(bytes)); }

size_t WeightBytes(const StartInputs& in) {
  const size_t table =
      static_cast<size_t>(in.model.vocab_size) * static_cast<size_t>(in.model.hidden_size);
  size_t packed = static_cast<size_t>(in.model.NumParameters());
  // The embedding is read where the checkpoint is mapped, and lies in memory only if made up.
  if (!in.model.tie_word_embeddings) packed -= table;
  return packed * DTypeSize(in.dtype) + (in.dummy ? table * sizeof(uint16_t) : 0);
}

// Activations of the largest step, logits and draws, in float32.
size_t WorkspaceBytes(const StartInputs& in) {
  const auto rows = static_cast<size_t>(in.max_num_batched_tokens);
  const auto hidden = static_cast<size_t>(in.model.hidden_size);
  const auto heads =
      static_cast<size_t>(in.model.num_heads) + 2 * static_cast<size_t>(in.model.num_kv_heads);
  const size_t width = 6 * hidden + 2 * heads * static_cast<size_t>(in.model.head_dim) +
                       3 * static_cast<size_t>(in.model.intermediate_size);
  const size_t logits =
      2 * static_cast<size_t>(in.max_num_seqs) * static_cast<size_t>(in.model.vocab_size);
  return kProcessBytes + (rows * width + logits) * sizeof(float);
}

KvLayout LayoutOf(const StartInputs& in) { return in.model.LayoutFor(in.block_size, in.kv_dtype); }

// Of a pool that holds as many of the longest sequences as a step may.
size_t EnoughKv(const StartInputs& in) {
  const KvLayout layout = LayoutOf(in);
  const int length = in.max_model_len > 0 ? in.max_model_len : in.model.MaxModelLen();
  return static_cast<size_t>(in.max_num_seqs) * static_cast<size_t>(layout.BlocksFor(length)) *
         layout.BlockBytes();
}

// All but the pools. The router is a process too.
size_t FixedBytes(const StartInputs& in, const StartPlan& plan) {
  return static_cast<size_t>(plan.copies) * plan.weights +
         static_cast<size_t>(in.workers) * plan.workspace + kProcessBytes;
}

size_t ChoosePool(const StartInputs& in, size_t fixed) {
  const size_t available = in.memory.available;
  const size_t left = available - std::min(available, fixed);
  const auto share = static_cast<size_t>(static_cast<double>(available) * kPoolShare);
  const auto fair =
      static_cast<size_t>(static_cast<double>(left) * kLeftShare / static_cast<double>(in.workers));
  const size_t chosen = std::min({EnoughKv(in), share, fair});
  return chosen - chosen % LayoutOf(in).BlockBytes();
}

// The least of a pool that is worth starting with: one sequence as asked for, or one block.
size_t LeastPool(const StartInputs& in) {
  const KvLayout layout = LayoutOf(in);
  return static_cast<size_t>(std::max(1, layout.BlocksFor(in.max_model_len))) * layout.BlockBytes();
}

// The figures, whether they fit or not.
StartPlan Figures(const StartInputs& in) {
  StartPlan plan;
  plan.weights = WeightBytes(in);
  plan.copies = in.share_weights ? 1 : in.workers;
  plan.workspace = WorkspaceBytes(in);
  const size_t fixed = FixedBytes(in, plan);
  plan.kv_pool = in.kv_bytes > 0 ? static_cast<size_t>(in.kv_bytes) : ChoosePool(in, fixed);
  const KvLayout layout = LayoutOf(in);
  plan.kv_tokens = static_cast<int64_t>(plan.kv_pool / layout.BlockBytes()) * layout.block_size;
  plan.max_model_len = static_cast<int>(std::min<int64_t>(
      plan.kv_tokens, in.max_model_len > 0 ? in.max_model_len : in.model.MaxModelLen()));
  plan.total = fixed + static_cast<size_t>(in.workers) * plan.kv_pool;
  return plan;
}

bool Fits(const StartInputs& in) {
  const StartPlan plan = Figures(in);
  return plan.total <= in.memory.available && plan.kv_pool >= LeastPool(in);
}

// Each change that alone would do, as flags.
std::vector<std::string> Remedies(const StartInputs& in) {
  std::vector<std::string> out;
  const auto consider = [&out](const StartInputs& changed, std::string flag) {
    if (Fits(changed)) out.push_back(std::move(flag));
  };
  if (!in.share_weights && in.ranks == 1) {
    StartInputs changed = in;
    changed.share_weights = true;
    consider(changed, "--share-weights=on");
  }
  if (in.kv_bytes > 0) {
    StartInputs changed = in;
    changed.kv_bytes = 0;
    consider(changed, fmt::format("--kv-cache-memory-bytes={}",
                                  ExactBytes(static_cast<int64_t>(Figures(changed).kv_pool))));
  }
  if (in.dtype == DType::kFloat32) {
    StartInputs changed = in;
    changed.dtype = DType::kBFloat16;
    if (in.kv_dtype == DType::kFloat32) changed.kv_dtype = DType::kBFloat16;
    consider(changed, "--dtype=bfloat16 on a CPU that has it");
  }
  StartInputs changed = in;
  while (changed.workers > 1 && !Fits(changed)) --changed.workers;
  if (changed.workers < in.workers) {
    consider(changed, fmt::format("{} instead of {} workers{}", changed.workers, in.workers,
                                  changed.workers == 1 ? " (--unified 1)" : ""));
  }
  return out;
}

}  // namespace

absl::StatusOr<StartPlan> PlanStart(const StartInputs& in) {
  const int limit = in.model.MaxModelLen();
  if (in.max_model_len > limit) {
    return InvalidArgument("--max-model-len={} exceeds what the model's positions allow, {}",
                           in.max_model_len, limit);
  }
  StartPlan plan = Figures(in);
  const size_t least = LeastPool(in);
  if (in.kv_bytes > 0 && plan.kv_pool < least) {
    return InvalidArgument("--kv-cache-memory-bytes={} is too small: {} take {}", in.kv_bytes,
                           in.max_model_len > 0
                               ? fmt::format("--max-model-len={} tokens", in.max_model_len)
                               : fmt::format("a block's {} tokens", in.block_size),
                           least);
  }
  if (!Fits(in)) {
    const size_t total =
        FixedBytes(in, plan) + static_cast<size_t>(in.workers) * std::max(plan.kv_pool, least);
    const std::vector<std::string> remedies = Remedies(in);
    return ResourceExhausted(
        "it does not fit into memory: weights {}{}, {} workers with a KV pool of {}{} and "
        "workspaces of {} each make {}; {} of {} are available ({}). {}",
        plan.copies > 1 ? fmt::format("{} x ", plan.copies) : "", Size(plan.weights), in.workers,
        plan.kv_pool < least ? "at least " : "", Size(std::max(plan.kv_pool, least)),
        Size(plan.workspace), Size(total), Size(in.memory.available), Size(in.memory.total),
        in.memory.limited_by,
        remedies.empty() ? "Free memory, or take a smaller model."
                         : fmt::format("What would fit: {}", absl::StrJoin(remedies, "; or ")));
  }
  const int wanted = in.max_model_len > 0 ? in.max_model_len : limit;
  if (plan.max_model_len < wanted) {
    plan.warnings.push_back(fmt::format(
        "sequences are cut to {} tokens, of the {} that the model allows: a KV pool of {} holds "
        "no more; --kv-cache-memory-bytes={} would",
        plan.max_model_len, wanted, Size(plan.kv_pool),
        ExactBytes(LayoutOf(in).BlocksFor(wanted) *
                   static_cast<int64_t>(LayoutOf(in).BlockBytes()))));
  }
  return plan;
}

absl::Status CheckMoreWorkers(const StartInputs& in) {
  if (Fits(in)) return absl::OkStatus();
  StartInputs fewer = in;
  while (fewer.workers > 0 && !Fits(fewer)) --fewer.workers;
  const StartPlan plan = Figures(in);
  return ResourceExhausted(
      "{} workers in all do not fit into memory: they would take {}, each a KV pool of {}{}, and "
      "what runs now and what is left make {} ({}); {} would fit",
      in.workers, Size(plan.total), Size(plan.kv_pool),
      plan.copies > 1 ? fmt::format(" and weights of {}", Size(plan.weights)) : "",
      Size(in.memory.available), in.memory.limited_by, fewer.workers);
}

std::string StartPlanText(const StartInputs& in, const StartPlan& plan,
                          const std::vector<std::string>& workers, int threads) {
  std::vector<std::vector<std::string>> rows = {
      {"worker", "weights", "KV pool", "KV tokens", "longest", "workspace", "threads"}};
  const bool shared = plan.copies == 1 && workers.size() > 1;
  for (const std::string& worker : workers) {
    rows.push_back({worker, shared ? "shared" : Size(plan.weights), Size(plan.kv_pool),
                    std::to_string(plan.kv_tokens), std::to_string(plan.max_model_len),
                    Size(plan.workspace), std::to_string(threads)});
  }
  std::string out = RenderTable(rows);
  out += fmt::format("weights {} as {}{}; KV as {}\nin all {}; {} are available ({}): it fits\n",
                     Size(plan.weights), DTypeName(in.dtype),
                     shared ? ", one copy for all workers" : "", DTypeName(in.kv_dtype),
                     Size(plan.total), Size(in.memory.available), in.memory.limited_by);
  return out;
}

}  // namespace tandem::cli
