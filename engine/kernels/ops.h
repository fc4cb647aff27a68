// The operations that a decoder's forward pass is made of, and the seam between the model, which is
// written once, and the devices. They are cut where a GPU wants one kernel: a norm belongs to the
// product that reads it, the residual sum to the product that adds to it, and rotation and the
// write of keys and values to the product that makes them. The CPU composes them from its own
// kernels.
//
// One step is
//   Begin, then per layer Qkv, Attention, AddProjection, GateUp, AddProjection; then, for the rows
//   whose logits are wanted, Logits and Sample. Where these are few, SelectRows after the last
//   Attention, so that the rest is computed of them alone.
//
// Rules for all:
//  - Pointers lead into memory of the device; what lies in the arguments themselves is the host's.
//  - Work is given to `stream` and may not be done when the call returns. Every op sees the results
//    of those before it on the same stream.
//  - Nothing is allocated and nothing waits: scratch memory is sized by OpsShape when the ops are
//    made. A step of the same numbers of rows and items, over the same addresses, is the same work,
//    so it can be recorded once and played again (CUDA graphs).
//  - Row-major matrices, dense unless a stride is given. Rows are tokens. The residual stream and
//    the logits are float32; what passes between a layer's ops is Ops::activation().
//  - A row's results depend on nothing but the row, its sequence's KV and the weights.
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine/device/stream.h"
#include "engine/kernels/element.h"
#include "engine/kernels/host_device.h"
#include "engine/kernels/int4_rows.h"
#include "engine/kernels/kv_pages.h"
#include "engine/kernels/packed_matrix.h"

namespace tandem::engine {

// The sizes that ops are made for.
struct OpsShape {
  Element element = Element::kFloat32;  // of packed weights: kFloat32 or kBFloat16
  size_t max_rows = 0;                  // of a step
  size_t max_items = 0;                 // sequences of a step
  size_t max_logit_rows = 0;            // of one call of Logits and Sample
  size_t hidden = 0;
  size_t q_width = 0;   // heads * head_dim
  size_t kv_width = 0;  // kv_heads * head_dim
  size_t head_dim = 0;
  size_t inner = 0;  // of the feed-forward block
  size_t vocab = 0;  // rows of the embedding and of the head
  // What the model has besides: norms of heads, biases of the output projection and of the
  // feed-forward block.
  bool qk_norm = false, output_bias = false, mlp_bias = false;
  // A row's results are bit-identical whatever else is in the batch, and however its sequence was
  // cut into steps.
  bool batch_invariant = false;
  bool int4 = false;    // some weights may have 4 bits
  bool fp8 = false;     // those of layers are rounded to 8 bits (fp8_rows.h)
  bool fp8_kv = false;  // pages may be of Element::kFloat8E4M3
  // Ranks that the model is split over (engine/device/collective.h). With several, AddProjection
  // adds to a part of a sum, and logits of the same rows have the same bits on devices of one kind.
  int ranks = 1;
};

// y = x W^T + bias.
struct Projection {
  PackedMatrix weight;          // of Ops
  const float* bias = nullptr;  // [weight.n] or null
};

// A norm over the residual stream: x / sqrt(mean(x^2) + epsilon) * weight.
struct Norm {
  const float* weight = nullptr;  // [hidden]
  float epsilon = 0;
};

// Where the value of a token id is not known to the host: the id -1 - i stands for the token that
// item i of the step before drew.
inline int32_t PendingId(int item) { return -1 - item; }
TANDEM_HOST_DEVICE inline int32_t ResolveId(int32_t id, const int32_t* drawn) {
  return id >= 0 ? id : drawn[-1 - id];
}

// The tokens of a step, item after item: an item is a run of consecutive positions of one sequence.
// Items that start at -1 pad a step to a size: they have one row, whose results mean nothing, and
// neither blocks nor KV.
struct RaggedBatch {
  int num_rows = 0;
  int num_items = 0;
  int max_item_rows = 0;                  // of the longest run
  int max_length = 0;                     // positions of the longest sequence, its run included
  const int32_t* token_ids = nullptr;     // [num_rows]
  const int32_t* positions = nullptr;     // [num_rows]
  const int32_t* first_rows = nullptr;    // [num_items + 1]
  const int32_t* starts = nullptr;        // [num_items]: position of the item's first row
  const int32_t* first_blocks = nullptr;  // [num_items + 1], into `blocks`
  const int32_t* blocks = nullptr;        // each item's pool blocks, in the order of positions
};

struct BeginArgs {
  const RaggedBatch* batch = nullptr;
  // The same in memory of the host, for a plan made there. Without arrays while the step is
  // recorded, to be played with other batches of as many items of one row each.
  const RaggedBatch* host = nullptr;
  const int32_t* drawn = nullptr;   // [items of the step before]; null: no id is pending
  const void* embedding = nullptr;  // [vocab][hidden]
  Element embedding_element = Element::kFloat32;
  const float* frequencies = nullptr;  // [head_dim / 2], radians per position
  float rope_scale = 1;                // of cosines and sines
  KvPages pages;                       // of any layer
  Norm next_norm;                      // of the first Qkv
  float* hidden = nullptr;             // out: [rows][hidden], the residual stream
};

// queries, keys, values = projection(norm(hidden)); each head of queries and keys normed where
// there are weights for it, and rotated (pairs of i and i + head_dim / 2); keys and values to their
// pages.
struct QkvArgs {
  const RaggedBatch* batch = nullptr;
  const float* hidden = nullptr;
  Norm norm;
  Projection projection;          // columns [heads | kv_heads | kv_heads] * head_dim
  const float* q_norm = nullptr;  // [head_dim] or null; epsilon as of `norm`
  const float* k_norm = nullptr;
  int heads = 0;
  KvPages pages;  // of this layer
  // out: what Attention reads, in the device's own layout; room for [rows][q_width + 2 * kv_width].
  void* queries = nullptr;
};

// Causal attention of each row over its sequence's positions up to its own. Query head h reads KV
// head h / (heads / kv_heads).
struct AttentionArgs {
  const RaggedBatch* batch = nullptr;
  const void* queries = nullptr;  // of Qkv
  KvPages pages;
  int heads = 0;
  float scale = 1;      // of scores
  void* out = nullptr;  // [rows][q_width]
};

// hidden += projection(x).
struct AddProjectionArgs {
  int rows = 0;
  const void* x = nullptr;  // [rows][projection.weight.k]
  Projection projection;
  // That will read this `hidden`, so that a device may prepare it; with several ranks it reads the
  // sum of theirs.
  Norm next_norm;
  float* hidden = nullptr;
};

// out = silu(gate) * up, where gate and up are the halves of projection(norm(hidden)).
struct GateUpArgs {
  int rows = 0;
  const float* hidden = nullptr;
  Norm norm;
  Projection projection;  // columns [inner | inner]
  void* out = nullptr;    // [rows][inner]
};

// to[i] = from[row_ids[i]]; the two do not overlap.
struct SelectRowsArgs {
  const int32_t* row_ids = nullptr;  // [count]
  int count = 0;
  const void* from = nullptr;
  size_t row_bytes = 0;  // even
  void* to = nullptr;
};

// logits[i] = projection(norm(hidden[row_ids[i]])).
struct LogitsArgs {
  const float* hidden = nullptr;
  const int32_t* row_ids = nullptr;  // [count]; null: row i is i
  int count = 0;                     // at most OpsShape::max_logit_rows
  Norm norm;
  Projection projection;
  float* logits = nullptr;  // out: [count][vocab]
};

inline constexpr int kMaxAlternatives = 20;

// Temperatures below this are greedy.
inline constexpr float kGreedyTemperature = 1e-5f;

// What one row of logits is wanted for: to draw the next token of an item, or to score a given one.
// Draws follow the order of steps of engine/runtime/sampler.h, with random numbers that are a
// function of (seed, position) alone: equal logits give equal tokens on every device.
struct DrawSpec {
  int32_t item = 0;           // whose token is drawn; -1: no later step takes it
  int32_t scored = -1;        // >= 0: nothing is drawn, this token is scored
  int32_t alternatives = -1;  // how many log probabilities are wanted besides the token's; -1: none
  int32_t position = 0;       // of the token to draw
  uint64_t seed = 0;
  float temperature = 0;  // below kGreedyTemperature: the most likely token
  float top_p = 1;
  float min_p = 0;
  int32_t top_k = 0;  // <= 0: off
  float repetition_penalty = 1;
  float presence_penalty = 0;
  float frequency_penalty = 0;
  // [begin, end) in SampleArgs::token_lists: tokens that may not be drawn; and where a penalty is
  // set the sequence's tokens so far, from `output_begin` on its generated ones. Ids may be
  // pending.
  int32_t masked_begin = 0, masked_end = 0;
  int32_t history_begin = 0, output_begin = 0, history_end = 0;
};

enum class DrawStatus : int32_t {
  kOk,
  kNan,              // the logits hold NaN
  kInfinite,         // the logits hold +inf
  kAllMasked,        // no token may be drawn
  kOutOfVocabulary,  // of the scored token
};

struct DrawResult {
  int32_t token = 0;
  DrawStatus status = DrawStatus::kOk;  // otherwise nothing else means anything
  float logprob = 0;                    // of the model's own distribution
  int32_t num_alternatives = 0;
  int32_t alternatives[kMaxAlternatives] = {};  // most likely first
  float alternative_logprobs[kMaxAlternatives] = {};
};

struct SampleArgs {
  const float* logits = nullptr;  // [count][vocab]; not changed
  int count = 0;
  int valid_vocab = 0;                    // ids below can be drawn; the rest are padding rows
  const DrawSpec* specs = nullptr;        // [count]
  const int32_t* token_lists = nullptr;   // what the specs point into
  const int32_t* drawn_before = nullptr;  // [items of the step before]: values of pending ids
  int32_t* drawn = nullptr;       // out: [spec.item] where >= 0; 0 where nothing could be drawn
  DrawResult* results = nullptr;  // out: [count]
};

// The ops of one device, made for one model. Not thread-safe; serves one stream.
class Ops {
 public:
  virtual ~Ops() = default;

  virtual Element activation() const = 0;

  // Weights, in the form that this device's products read. PackWeightRows packs `rows` rows of a
  // row-major [rows][k] matrix, in memory of the host or made by FillDummy(), as output columns
  // [first_column, first_column + rows) of `packed`: PackedWeightBytes(n, k) bytes of the device,
  // zeroed before the first call. The source stays as it is until the stream is past it. On an
  // asynchronous device several threads may pack, each on a stream of its own.
  virtual size_t PackedWeightBytes(size_t n, size_t k) const = 0;
  virtual void PackWeightRows(const void* source, Element source_element, size_t rows, size_t k,
                              size_t first_column, void* packed, Stream* stream) = 0;
  // The same of weights with 4 bits (int4_rows.h), for ops made with OpsShape::int4; 0 where
  // products do not read such a matrix as it is. The source is memory of the host that the device
  // can read (Device::AllocateStaging).
  virtual size_t PackedInt4Bytes(const Int4Shape& /*shape*/) const { return 0; }
  virtual void PackInt4Rows(const Int4Shape& /*shape*/, const Int4Rows& /*rows*/, void* /*packed*/,
                            Stream* /*stream*/) {}
  // Whether PackWeightRows' form is bfloat16 [n][k] itself, so that a table of it need not be
  // packed.
  virtual bool packs_plain_rows() const { return false; }
  // Whether FillDummy() makes weights up; else the host does.
  virtual bool fills_dummies() const { return false; }
  // Writes DummyValue(key, first + i) (dummy_value.h) to out[i], bfloat16 in memory of the device,
  // for i < count.
  virtual void FillDummy(uint64_t /*key*/, uint64_t /*first*/, size_t /*count*/, uint16_t* /*out*/,
                         Stream* /*stream*/) {}

  virtual void Begin(const BeginArgs& args, Stream* stream) = 0;
  virtual void Qkv(const QkvArgs& args, Stream* stream) = 0;
  virtual void Attention(const AttentionArgs& args, Stream* stream) = 0;
  virtual void SelectRows(const SelectRowsArgs& args, Stream* stream) = 0;
  virtual void AddProjection(const AddProjectionArgs& args, Stream* stream) = 0;
  virtual void GateUp(const GateUpArgs& args, Stream* stream) = 0;
  virtual void Logits(const LogitsArgs& args, Stream* stream) = 0;
  virtual void Sample(const SampleArgs& args, Stream* stream) = 0;
};

}  // namespace tandem::engine
