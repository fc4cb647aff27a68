#include "router/request/access_log.h"

#include <map>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "common/base/status.h"
#include "common/rpc/status.h"

namespace tandem::router {
namespace {

std::map<std::string, std::string> Fields(const AccessRecord& record) {
  std::map<std::string, std::string> out;
  for (const auto& [name, value] : AccessFields(record)) {
    const auto* text = std::get_if<std::string>(&value);
    const auto* number = std::get_if<int64_t>(&value);
    out[name] = text != nullptr     ? *text
                : number != nullptr ? std::to_string(*number)
                                    : std::to_string(std::get<double>(value));
  }
  return out;
}

TEST(AccessLogTest, SaysWhatTheRequestTookAndWhere) {
  AccessRecord record = {.id = "r1",
                         .session = "s",
                         .prompt_tokens = 100,
                         .cached_tokens = 64,
                         .completion_tokens = 7,
                         .drafts = {5, 3},
                         .attempts = 2};
  record.timing.decode_worker = "d";
  record.timing.prefill_worker = "p";
  record.timing.transport = "shm";
  record.timing.kv_bytes = 4096;
  record.timing.migrations = 1;
  record.timing.stages[Stage::kTtft] = 12.5;
  EXPECT_EQ(Fields(record), (std::map<std::string, std::string>{{"id", "r1"},
                                                                {"session", "s"},
                                                                {"code", "OK"},
                                                                {"prompt_tokens", "100"},
                                                                {"cached_tokens", "64"},
                                                                {"generated_tokens", "7"},
                                                                {"drafted_tokens", "5"},
                                                                {"accepted_tokens", "3"},
                                                                {"attempts", "2"},
                                                                {"decode_worker", "d"},
                                                                {"prefill_worker", "p"},
                                                                {"transport", "shm"},
                                                                {"kv_bytes", "4096"},
                                                                {"migrations", "1"},
                                                                {"ttft_ms", "12.500000"}}));
}

TEST(AccessLogTest, ARefusalThatMayQuoteTheClientNamesOnlyItsField) {
  AccessRecord record = {.id = "r"};
  record.status = BadField("sampling.top_p", "must be in (0, 1], got 3");
  EXPECT_EQ(Fields(record)["error"], "sampling.top_p must be in (0, 1], got 3");
  EXPECT_EQ(Fields(record)["field"], "sampling.top_p");
  record.status = WithField(absl::InvalidArgumentError("messages: refused: 'secret'"), "messages");
  EXPECT_EQ(Fields(record)["field"], "messages");
  EXPECT_FALSE(Fields(record).contains("error"));
  record.status = WithField(absl::NotFoundError("model 'secret' is not served"), "model");
  EXPECT_FALSE(Fields(record).contains("error"));
  record.status = ResourceExhausted("the queue is full");
  EXPECT_EQ(Fields(record)["error"], "the queue is full");
  EXPECT_EQ(Fields(record)["code"], "RESOURCE_EXHAUSTED");
}

}  // namespace
}  // namespace tandem::router
