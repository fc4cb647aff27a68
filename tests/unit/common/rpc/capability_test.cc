#include <string>

#include "gmock/gmock.h"
#include "google/protobuf/descriptor.h"
#include "gtest/gtest.h"

#include "common/base/block_hash.h"
#include "common/rpc/cluster_client.h"

namespace tandem {
namespace {

using internal::v1::Capability;
using testing::HasSubstr;

TEST(CapabilityTest, EqualHasNoDifference) {
  Capability capability;
  capability.set_model("m");
  capability.set_block_size(16);
  EXPECT_EQ(DescribeDifference(capability, capability), "");
  EXPECT_EQ(CapabilityDigest(capability), CapabilityDigest(capability));
  EXPECT_EQ(CapabilityDigest(capability).size(), 32u);
}

// While releases that share a protocol replace each other their workers compare digests.
TEST(CapabilityTest, TheDigestIsThatOfBuildsWithoutTheNewestField) {
  Capability capability;
  capability.set_model("m");
  capability.set_block_size(16);
  const std::string before =
      "model=1:m;model_digest=6:(none);dtype=6:(none);kv_dtype=6:(none);num_layers=1:0;"
      "num_kv_heads=1:0;head_dim=1:0;block_size=2:16;layout=6:(none);tokenizer_digest=6:(none);"
      "protocol_version=1:0;vocab_size=1:0;";
  EXPECT_EQ(CapabilityDigest(capability), HashBytes(before).ToHex());
  capability.set_quantization("fp8");
  EXPECT_NE(CapabilityDigest(capability), HashBytes(before).ToHex());
}

TEST(CapabilityTest, NamesWhatDiffers) {
  Capability cluster;
  cluster.set_block_size(16);
  cluster.set_dtype("float32");
  Capability worker = cluster;
  worker.set_block_size(32);
  EXPECT_EQ(DescribeDifference(cluster, worker), "block_size: this worker 32, cluster 16");
  worker.set_dtype("");
  EXPECT_EQ(DescribeDifference(cluster, worker),
            "dtype: this worker (none), cluster float32; block_size: this worker 32, cluster 16");
}

TEST(CapabilityTest, SaysWhichFlagCuresIt) {
  Capability cluster;
  cluster.set_model("m");
  cluster.set_dtype("float32");
  cluster.set_kv_dtype("float32");
  Capability worker = cluster;
  worker.set_model("n");
  worker.set_dtype("bfloat16");
  worker.set_kv_dtype("bfloat16");
  EXPECT_EQ(DifferenceRemedy(cluster, worker),
            "start it with --served-model-name=m --dtype=float32");
  worker.set_model_digest("other");
  worker.set_num_layers(3);
  EXPECT_EQ(DifferenceRemedy(cluster, worker),
            "start it with --served-model-name=m --dtype=float32, and with the same: the "
            "checkpoint in --model, --load-format and --seed; config.json in --model");
}

TEST(CapabilityTest, KvInFp8HasAFlagOfItsOwn) {
  Capability fp8;
  fp8.set_dtype("bfloat16");
  fp8.set_kv_dtype("fp8");
  Capability plain = fp8;
  plain.set_kv_dtype("bfloat16");
  EXPECT_EQ(DescribeDifference(fp8, plain), "kv_dtype: this worker bfloat16, cluster fp8");
  EXPECT_EQ(DifferenceRemedy(fp8, plain), "start it with --kv-cache-dtype=fp8");
  EXPECT_EQ(DifferenceRemedy(plain, fp8), "start it with --kv-cache-dtype=auto");
  plain.set_dtype("float32");
  EXPECT_EQ(DifferenceRemedy(plain, fp8), "start it with --dtype=float32 --kv-cache-dtype=auto");
}

TEST(CapabilityTest, WeightsInFp8HaveAFlagOfTheirOwn) {
  Capability fp8;
  fp8.set_quantization("fp8");
  const Capability plain;
  EXPECT_EQ(DescribeDifference(fp8, plain), "quantization: this worker (none), cluster fp8");
  EXPECT_EQ(DifferenceRemedy(fp8, plain), "start it with --quantization=fp8");
  EXPECT_EQ(DifferenceRemedy(plain, fp8), "start it with --quantization=auto");
}

TEST(CapabilityTest, ShowsNoDigestAndNothingLongOrForged) {
  Capability here;
  here.set_model_digest("0123456789");
  Capability there;
  there.set_model_digest("abcdef");
  EXPECT_EQ(DescribeDifference(here, there), "model_digest differs");
  there = here;
  there.set_model("line\n12:00 router: all is well" + std::string(1 << 20, 'x'));
  const std::string shown = DescribeDifference(here, there);
  EXPECT_LT(shown.size(), 200u);
  EXPECT_EQ(shown.find('\n'), std::string::npos);
}

TEST(CapabilityTest, DigestOfAMissingFileIsEmpty) {
  EXPECT_EQ(TokenizerDigest("/nonexistent"), "");
}

TEST(CapabilityTest, WhatCanBeConvertedMayDiffer) {
  Capability split;
  split.set_tensor_parallel_size(4);
  EXPECT_EQ(DescribeDifference(Capability(), split), "");
  EXPECT_EQ(CapabilityDigest(Capability()), CapabilityDigest(split));
}

TEST(CapabilityTest, EveryOtherFieldIsCompared) {
  const Capability base;
  const google::protobuf::Descriptor* descriptor = Capability::descriptor();
  for (int i = 0; i < descriptor->field_count(); ++i) {
    const google::protobuf::FieldDescriptor* field = descriptor->field(i);
    if (field->name() == "tensor_parallel_size") continue;
    Capability changed;
    if (field->cpp_type() == google::protobuf::FieldDescriptor::CPPTYPE_STRING) {
      changed.GetReflection()->SetString(&changed, field, "other");
    } else {
      changed.GetReflection()->SetUInt32(&changed, field, 7);
    }
    EXPECT_THAT(DescribeDifference(base, changed), HasSubstr(field->name()));
    EXPECT_NE(CapabilityDigest(base), CapabilityDigest(changed)) << field->name();
  }
}

}  // namespace
}  // namespace tandem
