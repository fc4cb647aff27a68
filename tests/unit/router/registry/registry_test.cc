#include "router/registry/registry.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "common/rpc/cluster_client.h"
#include "simulation/fake_clock.h"
#include "tandem/internal/v1/cluster.pb.h"
#include "tests/support/paths.h"
#include "tests/unit/router/fake_capability.h"

namespace tandem::router {
namespace {

using ::testing::HasSubstr;

WorkerIdentity MakeIdentity(const std::string& id, uint64_t incarnation, WorkerRole role) {
  WorkerIdentity identity;
  identity.id = id;
  identity.incarnation = incarnation;
  identity.role = role;
  identity.address = "127.0.0.1:1";
  identity.max_model_len = 100 * static_cast<int>(incarnation);
  identity.num_blocks = 10;
  return identity;
}

class RegistryTest : public ::testing::Test {
 protected:
  absl::StatusOr<Registry::Member> Join(const std::string& id, uint64_t incarnation,
                                        WorkerRole role = WorkerRole::kDecode) {
    return registry_.Join(MakeIdentity(id, incarnation, role), FakeCapability("m", 512), nullptr);
  }

  FakeClock clock_;
  PrefixIndex index_;
  Registry registry_{{.model = "m", .vocab_size = 512}, &index_, &clock_};
};

TEST_F(RegistryTest, PublishesWhoIsThere) {
  int changes = 0;
  registry_.SetListener([&] { ++changes; });
  EXPECT_FALSE(registry_.view()->Serving());
  const auto d = Join("d", 3);
  ASSERT_OK(d);
  EXPECT_FALSE(registry_.view()->Serving());
  const auto p = Join("p", 2, WorkerRole::kPrefill);
  ASSERT_OK(p);
  const auto before = registry_.view();
  EXPECT_TRUE(before->Serving());
  EXPECT_EQ(before->block_size, 16);
  EXPECT_EQ(before->kv_bytes_per_token, 2 * 2 * 64 * 4);

  LoadReport load;
  load.waiting_tokens = 77;
  registry_.Report(*p, load);
  EXPECT_EQ(registry_.view()->Find("p")->load->waiting_tokens, 77);
  EXPECT_EQ(before->Find("p")->load->waiting_tokens, 0);  // views do not change

  registry_.Leave(*d);
  EXPECT_EQ(registry_.view()->Find("d"), nullptr);
  EXPECT_FALSE(registry_.view()->Serving());
  EXPECT_EQ(changes, 4);
}

TEST_F(RegistryTest, RefusesAnotherCapabilityWithOneLine) {
  const auto first = Join("a", 1);
  ASSERT_OK(first);
  internal::v1::Capability other = FakeCapability("m", 512);
  other.set_block_size(32);
  const auto refused = registry_.Join(MakeIdentity("b", 2, WorkerRole::kPrefill), other, nullptr);
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(refused.status().message()),
              HasSubstr("block_size: this worker 32, cluster 16; start it with "
                        "--block-size=16"));
  // When all have left another kind of cluster may form.
  registry_.Leave(*first);
  EXPECT_OK(registry_.Join(MakeIdentity("b", 2, WorkerRole::kPrefill), other, nullptr));
}

TEST_F(RegistryTest, RefusesAnotherModelThanTheRouters) {
  internal::v1::Capability other = FakeCapability("m", 512);
  other.set_model("n");
  other.set_vocab_size(1024);
  const auto refused = registry_.Join(MakeIdentity("b", 2, WorkerRole::kPrefill), other, nullptr);
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(refused.status().message()),
              HasSubstr("model: this worker n, cluster m; "));
  EXPECT_THAT(std::string(refused.status().message()),
              HasSubstr("vocab_size: this worker 1024, cluster 512"));
}

// What the router has in its own model directory counts, whoever comes first.
TEST_F(RegistryTest, TheFirstToJoinDoesNotDefineTheModel) {
  Registry registry({.model = "m",
                     .tokenizer_digest = "t",
                     .vocab_size = 512,
                     .num_layers = 2,
                     .num_kv_heads = 1,
                     .head_dim = 64},
                    &index_, &clock_);
  internal::v1::Capability odd = FakeCapability("m", 512);
  odd.set_num_layers(3);
  odd.set_num_kv_heads(4);
  odd.set_head_dim(5);
  odd.set_tokenizer_digest("other");
  const auto refused = registry.Join(MakeIdentity("a", 1, WorkerRole::kDecode), odd, nullptr);
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(
      std::string(refused.status().message()),
      testing::AllOf(HasSubstr("num_layers: this worker 3, cluster 2"), HasSubstr("num_kv_heads"),
                     HasSubstr("head_dim"), HasSubstr("tokenizer_digest differs")));
  EXPECT_OK(
      registry.Join(MakeIdentity("b", 1, WorkerRole::kDecode), FakeCapability("m", 512), nullptr));
}

// Weights, dtype, block size and release too, where the router was told; the line says which
// differs and what to make the same, and no digest.
TEST_F(RegistryTest, TheFirstToJoinDoesNotDefineTheCluster) {
  Registry registry({.model = "m",
                     .model_digest = "digest",
                     .dtype = "float32",
                     .kv_dtype = "float32",
                     .quantization = "fp8",
                     .block_size = 16,
                     .protocol_version = kProtocolVersion},
                    &index_, &clock_);
  internal::v1::Capability fits = FakeCapability("m", 512);
  fits.set_quantization("fp8");
  const auto refusal = [&](auto change) {
    internal::v1::Capability odd = fits;
    change(&odd);
    return std::string(
        registry.Join(MakeIdentity("a", 1, WorkerRole::kDecode), odd, nullptr).status().message());
  };
  using Capability = internal::v1::Capability;
  EXPECT_EQ(refusal([](Capability* c) { c->set_model_digest("other"); }),
            "the worker does not fit the cluster: model_digest differs; start it with the "
            "same: the checkpoint in --model, --load-format and --seed");
  EXPECT_EQ(refusal([](Capability* c) {
              c->set_dtype("bfloat16");
              c->set_kv_dtype("bfloat16");
              c->set_block_size(32);
            }),
            "the worker does not fit the cluster: dtype: this worker bfloat16, cluster float32; "
            "kv_dtype: this worker bfloat16, cluster float32; block_size: this worker 32, cluster "
            "16; start it with --dtype=float32 --block-size=16");
  EXPECT_EQ(refusal([](Capability* c) { c->set_kv_dtype("fp8"); }),
            "the worker does not fit the cluster: kv_dtype: this worker fp8, cluster float32; "
            "start it with --kv-cache-dtype=auto");
  EXPECT_EQ(refusal([](Capability* c) { c->set_quantization(""); }),
            "the worker does not fit the cluster: quantization: this worker (none), cluster fp8; "
            "start it with --quantization=fp8");
  EXPECT_THAT(refusal([](Capability* c) { c->set_protocol_version(0); }),
              HasSubstr("the release of Tandem"));
  // None of them is in the way of one that fits.
  EXPECT_OK(registry.Join(MakeIdentity("b", 1, WorkerRole::kDecode), fits, nullptr));
}

TEST_F(RegistryTest, NobodyLowersTheLimitOfTheCluster) {
  WorkerIdentity small = MakeIdentity("small", 1, WorkerRole::kUnified);
  small.max_model_len = 1;
  ASSERT_OK(registry_.Join(small, FakeCapability("m", 512), nullptr));
  EXPECT_EQ(registry_.view()->max_model_len, 1);
  ASSERT_OK(Join("d", 3));
  EXPECT_EQ(registry_.view()->max_model_len, 300);
  ASSERT_OK(Join("p", 9, WorkerRole::kPrefill));
  EXPECT_EQ(registry_.view()->max_model_len, 300);  // answers are decoded elsewhere
}

TEST_F(RegistryTest, ANameBelongsToOneProcess) {
  const auto first = Join("a", 1);
  ASSERT_OK(first);
  index_.Apply(*first, false, std::vector<Hash128>{{1, 1}}, {});
  EXPECT_EQ(Join("a", 2).status().code(), absl::StatusCode::kAlreadyExists);
  // The same process on a new stream takes its place, with an empty cache.
  const auto again = Join("a", 1);
  ASSERT_OK(again);
  EXPECT_EQ(index_.size(), 0u);
  registry_.Leave(*first);  // the old stream ends late: nothing happens
  EXPECT_NE(registry_.view()->Find("a"), nullptr);
  registry_.Leave(*again);
  EXPECT_OK(Join("a", 2));
}

TEST_F(RegistryTest, DrainTellsTheWorkerAndTakesItOut) {
  int told = 0;
  ASSERT_OK(registry_.Join(MakeIdentity("u", 1, WorkerRole::kUnified), FakeCapability("m", 512),
                           [&] { ++told; }));
  EXPECT_TRUE(registry_.view()->Serving());
  const absl::Status unknown = registry_.Drain("x");
  EXPECT_EQ(unknown.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(unknown.message()), HasSubstr("[u]"));
  EXPECT_OK(registry_.Drain("u"));
  EXPECT_OK(registry_.Drain("u"));
  EXPECT_EQ(told, 1);
  EXPECT_FALSE(registry_.view()->Serving());
  EXPECT_TRUE(registry_.view()->Find("u")->draining);
}

}  // namespace
}  // namespace tandem::router
