// Weights in a card's memory: those of a checkpoint are its bytes, made up ones are the CPU's.
#include <cstdlib>

#include "fmt/format.h"
#include "gtest/gtest.h"

#include "engine/device/cpu/threads.h"
#include "engine/model/dummy_weights.h"
#include "engine/model/model_weights.h"
#include "engine/runtime/backend.h"
#include "engine/runtime/decoder_runner.h"
#include "tests/support/paths.h"

namespace tandem::engine {
namespace {

class LoadTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto backend = OpenBackend("cuda", {});
    if (!backend.ok()) GTEST_SKIP() << backend.status().message();
    backend_ = *std::move(backend);
    stream_ = backend_->device().NewStream();
  }
  void Load(const std::string& dir, bool dummy) {
    config_ = ModelConfig::Load(dir).value();
    ops_ = backend_->MakeOps(OpsShapeOf(config_, Element::kBFloat16, {16, 16, 16})).value();
    auto weights = LoadModelWeights(config_, {dir, dummy, 5, Element::kBFloat16, 2},
                                    &backend_->device(), ops_.get());
    ASSERT_OK(weights.status());
    weights_ = *std::move(weights);
  }
  std::vector<uint16_t> Bits(const void* from, size_t count) {
    std::vector<uint16_t> bits(count);
    stream_->CopyToHost(bits.data(), from, count * sizeof(uint16_t));
    stream_->Synchronize();
    return bits;
  }
  // Rows [first, first + rows) of a matrix of plain rows, beside what the CPU makes of `name`.
  void ExpectRows(const void* matrix, size_t first, size_t rows, size_t k,
                  const std::vector<uint16_t>& wanted, const std::string& name) {
    const auto got = Bits(static_cast<const uint16_t*>(matrix) + first * k, rows * k);
    ASSERT_EQ(got.size(), wanted.size()) << name;
    size_t bad = 0;
    for (size_t i = 0; i < got.size(); ++i) {
      if (got[i] != wanted[i] && bad++ == 0) {
        ADD_FAILURE() << name << "[" << i / k << "][" << i % k << "]: got bits " << got[i]
                      << ", wanted " << wanted[i];
      }
    }
    EXPECT_EQ(bad, 0) << "of " << got.size();
  }
  std::vector<uint16_t> Dummy(const std::string& name, size_t count) {
    Threads threads(4);
    std::vector<uint16_t> values(count);
    FillDummyTensor(name, 5, values, &threads);
    return values;
  }
  std::vector<uint16_t> Stored(const std::string& name) {
    const TensorView view = weights_.checkpoint->Get(name).value();
    std::vector<uint16_t> values(view.bytes / ElementSize(view.element));
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = FloatToBF16(LoadElement(view.data, view.element, i));
    }
    return values;
  }
  // Every matrix of the model, wherever its values come from.
  template <typename Wanted>
  void ExpectModel(Wanted wanted) {
    const auto hidden = static_cast<size_t>(config_.hidden_size);
    const auto inner = static_cast<size_t>(config_.intermediate_size);
    const auto q = static_cast<size_t>(config_.num_heads * config_.head_dim);
    const auto kv = static_cast<size_t>(config_.num_kv_heads * config_.head_dim);
    for (size_t i = 0; i < weights_.layers.size(); ++i) {
      const LayerWeights& layer = weights_.layers[i];
      const auto check = [&](const LinearWeights& w, const std::string& part, size_t first,
                             size_t rows, size_t k) {
        const std::string name = fmt::format("model.layers.{}.{}.weight", i, part);
        ExpectRows(w.memory.data(), first, rows, k, wanted(name, rows * k), name);
      };
      check(layer.qkv, "self_attn.q_proj", 0, q, hidden);
      check(layer.qkv, "self_attn.k_proj", q, kv, hidden);
      check(layer.qkv, "self_attn.v_proj", q + kv, kv, hidden);
      check(layer.output, "self_attn.o_proj", 0, hidden, q);
      check(layer.gate_up, "mlp.gate_proj", 0, inner, hidden);
      check(layer.gate_up, "mlp.up_proj", inner, inner, hidden);
      check(layer.down, "mlp.down_proj", 0, hidden, inner);
    }
    const auto vocab = static_cast<size_t>(config_.vocab_size);
    const std::string table = "model.embed_tokens.weight";
    ExpectRows(weights_.embedding_data(), 0, vocab, hidden, wanted(table, vocab * hidden), table);
    const std::string head = config_.tie_word_embeddings ? table : "lm_head.weight";
    if (config_.tie_word_embeddings) {
      EXPECT_EQ(weights_.head.memory.size(), 0) << "the table is the head";
    }
    ExpectRows(weights_.head.matrix.data, 0, vocab, hidden, wanted(head, vocab * hidden), head);
  }

  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Stream> stream_;
  std::unique_ptr<Ops> ops_;
  ModelConfig config_;
  ModelWeights weights_;
};

// TANDEM_LOAD_TEST_MODEL names a larger one: of many pieces and threads.
TEST_F(LoadTest, ACheckpointsBytes) {
  const char* other = std::getenv("TANDEM_LOAD_TEST_MODEL");
  Load(other != nullptr ? other : SourcePath("models/demo"), false);
  if (HasFailure()) return;
  ExpectModel([this](const std::string& name, size_t) { return Stored(name); });
}

TEST_F(LoadTest, DummyWeightsAreTheCpus) {
  Load(SourcePath("models/demo"), true);
  if (HasFailure()) return;
  ExpectModel([this](const std::string& name, size_t count) { return Dummy(name, count); });
  EXPECT_EQ(weights_.dummy_embedding.size(), 0) << "nothing of it on the host";
}

}  // namespace
}  // namespace tandem::engine
