// How an answer's cost is told.
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "cli/inference_client.h"

namespace tandem::cli {
namespace {

Answer AnswerOf(uint32_t tokens) {
  Answer answer;
  answer.whole.mutable_usage()->set_prompt_tokens(12);
  answer.whole.mutable_usage()->set_completion_tokens(tokens);
  v1::Timing* timing = answer.whole.mutable_timing();
  timing->set_ttft(20);
  timing->set_total(420);
  timing->set_kv_bytes(192 << 10);
  timing->set_prefill_worker("prefill-0");
  timing->set_decode_worker("decode-1");
  timing->set_transport("shm");
  return answer;
}

TEST(DescribeCostTest, SaysRateAndSizes) {
  EXPECT_EQ(DescribeCost(AnswerOf(5)),
            "[12 prompt tokens (0 cached), 5 generated, TTFT 20.0 ms, 10.0 tok/s, prefill-0 -> "
            "decode-1, 192 KiB of KV by shm]");
}

// The first token is what the rate is counted from.
TEST(DescribeCostTest, OneTokenHasNoRate) {
  EXPECT_EQ(DescribeCost(AnswerOf(1)),
            "[12 prompt tokens (0 cached), 1 generated, TTFT 20.0 ms, prefill-0 -> decode-1, "
            "192 KiB of KV by shm]");
}

}  // namespace
}  // namespace tandem::cli
