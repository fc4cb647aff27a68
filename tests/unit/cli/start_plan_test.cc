#include "cli/start_plan.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "cli/start_check.h"
#include "common/config/bytes.h"
#include "tests/support/paths.h"

namespace tandem::cli {
namespace {

using ::testing::AllOf;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;

constexpr size_t kGiB = size_t{1} << 30;

// Qwen2.5-7B's shape: 14.19 GiB of weights in bfloat16, 57,344 bytes of KV a token.
ModelConfig SevenB() {
  return ModelConfig::Parse(R"({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2",
      "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
      "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
      "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
      "tie_word_embeddings": false, "torch_dtype": "bfloat16", "hidden_act": "silu"})",
                            "test")
      .value();
}

StartInputs Inputs(size_t available) {
  StartInputs in;
  in.model = SevenB();
  in.dummy = true;
  in.dtype = in.kv_dtype = DType::kBFloat16;
  in.workers = 2;
  in.memory = {available, available, "this machine"};
  return in;
}

TEST(StartPlan, OneCopyOfTheWeightsAndAPoolForEachWorker) {
  const StartInputs in = Inputs(24 * kGiB);
  const auto plan = PlanStart(in);
  ASSERT_OK(plan);
  // Made up: 7,615,616,512 parameters, the embedding's 152,064 x 3,584 as they are.
  EXPECT_EQ(plan->weights, 2 * size_t{7'615'616'512});
  EXPECT_EQ(plan->copies, 1);
  // A fifth of what is available would be less than what is left for two; 917,504 bytes a block.
  EXPECT_LE(plan->kv_pool, 24 * kGiB / 5);
  EXPECT_EQ(plan->kv_pool % 917'504, 0u);
  EXPECT_EQ(plan->kv_tokens, static_cast<int64_t>(plan->kv_pool / 917'504) * 16);
  EXPECT_GT(plan->kv_tokens, 32'768);
  EXPECT_EQ(plan->max_model_len, 32'768);
  EXPECT_LE(plan->total, in.memory.available);
  EXPECT_THAT(plan->warnings, IsEmpty());
}

// What happened on 9b27710: each of two workers compared its own weights with all of the memory.
TEST(StartPlan, TwoCopiesOfSevenBDoNotFitInto24GiB) {
  StartInputs in = Inputs(24 * kGiB);
  in.share_weights = false;
  const auto plan = PlanStart(in);
  EXPECT_EQ(plan.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(plan.status().message()),
              AllOf(HasSubstr("2 x 14.2 GiB"), HasSubstr("2 workers"),
                    HasSubstr("24.0 GiB of 24.0 GiB are available"), HasSubstr("this machine"),
                    HasSubstr("What would fit: --share-weights=on; or 1 instead of 2 workers")));
}

TEST(StartPlan, SaysThePoolThatWouldFit) {
  StartInputs in = Inputs(24 * kGiB);
  in.kv_bytes = int64_t{8} << 30;
  const auto refused = PlanStart(in);
  const std::string message(refused.status().message());
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted);
  const std::string flag = "--kv-cache-memory-bytes=";
  const size_t at = message.find(flag);
  ASSERT_NE(at, message.npos) << message;
  const size_t value = at + flag.size();
  in.kv_bytes = ParseBytes(message.substr(value, message.find(';', value) - value)).value();
  EXPECT_OK(PlanStart(in));
}

TEST(StartPlan, SaysWhenNothingHelps) {
  const auto plan = PlanStart(Inputs(4 * kGiB));
  EXPECT_EQ(plan.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(plan.status().message()), HasSubstr("take a smaller model"));
}

TEST(StartPlan, Float32IsToldOfBFloat16) {
  StartInputs in = Inputs(24 * kGiB);
  in.dtype = DType::kFloat32;
  EXPECT_THAT(std::string(PlanStart(in).status().message()), HasSubstr("--dtype=bfloat16"));
}

TEST(StartPlan, KvInFp8TakesHalf) {
  StartInputs in = Inputs(24 * kGiB);
  in.kv_bytes = 1 << 30;
  const auto plain = PlanStart(in);
  in.kv_dtype = DType::kFloat8E4M3;
  const auto fp8 = PlanStart(in);
  ASSERT_OK(plain);
  ASSERT_OK(fp8);
  EXPECT_EQ(fp8->kv_tokens, (1 << 30) / 458'752 * 16);
  EXPECT_EQ(plain->kv_tokens, (1 << 30) / 917'504 * 16);
  EXPECT_EQ(fp8->weights, plain->weights);
  EXPECT_THAT(StartPlanText(in, *fp8, {"decode-0"}, 1), HasSubstr("as bfloat16; KV as fp8"));
}

TEST(StartPlan, AShortenedLengthIsAWarning) {
  StartInputs in = Inputs(24 * kGiB);
  in.kv_bytes = 10 * 917'504;
  const auto plan = PlanStart(in);
  ASSERT_OK(plan);
  EXPECT_EQ(plan->max_model_len, 160);
  EXPECT_THAT(plan->warnings, ElementsAre(AllOf(HasSubstr("cut to 160 tokens, of the 32768"),
                                                HasSubstr("--kv-cache-memory-bytes=1792MiB"))));
  in.max_model_len = 161;
  EXPECT_EQ(PlanStart(in).status().code(), absl::StatusCode::kInvalidArgument);
  in.max_model_len = 40'000;
  EXPECT_THAT(std::string(PlanStart(in).status().message()), HasSubstr("--max-model-len=40000"));
}

TEST(StartPlan, TextHasARowForEachWorker) {
  const StartInputs in = Inputs(24 * kGiB);
  const std::string text = StartPlanText(in, PlanStart(in).value(), {"prefill-0", "decode-0"}, 3);
  EXPECT_THAT(text,
              AllOf(HasSubstr("prefill-0  shared"), HasSubstr("decode-0   shared"),
                    HasSubstr("14.2 GiB as bfloat16, one copy for all"), HasSubstr("it fits")));
  for (size_t begin = 0, end; (end = text.find('\n', begin)) != text.npos; begin = end + 1) {
    EXPECT_LE(end - begin, 80u) << text;
  }
}

class StartCheckTest : public testing::Test {
 protected:
  absl::StatusOr<CheckedStart> Check(std::vector<std::string> flags) {
    return CheckStart({.model_dir = SourcePath("models/demo"),
                       .flags = std::move(flags),
                       .workers = {"prefill-0", "decode-0"}},
                      {4 * kGiB, 4 * kGiB, "this machine"});
  }
};

TEST_F(StartCheckTest, ReadsTheWorkersFlags) {
  const auto start = Check({"--dtype", "float32", "--block-size=32", "--kv-cache-memory-bytes=4MiB",
                            "--kv-cache-memory-bytes", "64MiB", "--max-num-seqs=600", "--anything",
                            "--kv-cache-dtype=fp8"});
  ASSERT_OK(start);
  EXPECT_EQ(start->inputs.dtype, DType::kFloat32);
  EXPECT_EQ(start->inputs.kv_dtype, DType::kFloat8E4M3);
  EXPECT_EQ(start->inputs.block_size, 32);
  EXPECT_EQ(start->inputs.kv_bytes, 64 << 20);
  EXPECT_EQ(start->inputs.max_num_seqs, 600);
  EXPECT_EQ(start->inputs.max_num_batched_tokens, 600);
  EXPECT_TRUE(start->model.has_tokenizer);
  EXPECT_TRUE(start->model.has_chat_template);
  EXPECT_THAT(start->warnings, IsEmpty());
}

TEST_F(StartCheckTest, SaysThatWeightsInFp8SaveNothingOnACpu) {
  const auto start = Check({"--dtype=float32", "--quantization=fp8"});
  ASSERT_OK(start);
  EXPECT_THAT(start->warnings, Contains(AllOf(HasSubstr("--quantization=fp8"),
                                              HasSubstr("saves nothing on a CPU, which keeps them "
                                                        "as float32"))));
}

TEST_F(StartCheckTest, RefusesWhatTheDeviceDoesNotTake) {
  EXPECT_THAT(std::string(Check({"--devices", "0,1"}).status().message()),
              HasSubstr("--devices=0,1 names GPUs, and workers would compute on the CPU"));
  EXPECT_THAT(std::string(CheckStart({.model_dir = SourcePath("models/demo"),
                                      .flags = {"--quantization=fp8"},
                                      .workers = {"prefill-0"},
                                      .on_cpu = false},
                                     {4 * kGiB, 4 * kGiB, "this machine"})
                              .status()
                              .message()),
              HasSubstr("--quantization=fp8 is for CPUs"));
}

// On 9b27710 a worker refused them once the router was up.
TEST_F(StartCheckTest, RefusesWhatAWorkerWould) {
  EXPECT_THAT(std::string(Check({"--dtype=fp16"}).status().message()),
              HasSubstr("--dtype=fp16: must be one of auto, float32, bfloat16"));
  EXPECT_THAT(std::string(Check({"--kv-cache-dtype=fp16"}).status().message()),
              HasSubstr("--kv-cache-dtype=fp16: must be one of auto, fp8"));
  EXPECT_THAT(std::string(Check({"--quantization=gptq"}).status().message()),
              HasSubstr("--quantization=gptq: must be one of auto, fp8"));
  EXPECT_THAT(std::string(CheckStart({.model_dir = SourcePath("tests/data/quantised/gptq"),
                                      .flags = {"--quantization=fp8"},
                                      .workers = {"prefill-0", "decode-0"}},
                                     {4 * kGiB, 4 * kGiB, "this machine"})
                              .status()
                              .message()),
              HasSubstr("--quantization=fp8 is for weights that are not quantised"));
  EXPECT_THAT(std::string(Check({"--block-size=17"}).status().message()),
              HasSubstr("--block-size=17: must be one of 16, 32"));
  EXPECT_THAT(std::string(Check({"--kv-cache-memory-bytes=much"}).status().message()),
              HasSubstr("--kv-cache-memory-bytes=much"));
}

}  // namespace
}  // namespace tandem::cli
