#include "router/api/request_wire.h"

#include <climits>
#include <cmath>
#include <functional>
#include <limits>
#include <optional>
#include <set>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "common/auth/voucher.h"
#include "common/rpc/status.h"
#include "router/api/message_wire.h"
#include "router/api/response_wire.h"
#include "simulation/fake_clock.h"
#include "tandem/internal/v1/decode.pb.h"
#include "tests/support/paths.h"

namespace tandem::router {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr int kMaxModelLen = 100;

const ServedModel& Demo() {
  static const auto* const model =
      new ServedModel(ServedModel::Load(SourcePath("models/demo"), "").value());
  return *model;
}

RequestLimits Limits() {
  RequestLimits limits;
  limits.max_model_len = kMaxModelLen;
  return limits;
}

absl::StatusOr<Request> Read(const v1::GenerateRequest& message, const ServedModel& model = Demo(),
                             const RequestLimits& limits = Limits()) {
  FakeClock clock;
  return GenerateRequestFromProto(model, limits, message, clock.Now(),
                                  clock.Now() + absl::Seconds(1), &clock);
}

absl::StatusOr<Request> ReadChat(const v1::ChatRequest& message) {
  FakeClock clock;
  return ChatRequestFromProto(Demo(), Limits(), message, clock.Now(),
                              clock.Now() + absl::Seconds(1), &clock);
}

struct BadCase {
  std::string field;    // of the violation
  std::string message;  // part of it
  std::function<void(v1::GenerateRequest*)> change;
};

TEST(RequestWire, EveryBadFieldIsNamed) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  using R = v1::GenerateRequest*;
  const std::vector<BadCase> cases = {
      {"text", "text is empty", [](R r) { r->set_text(""); }},
      {"prompt", "prompt is empty", [](R r) { r->clear_text(); }},
      {"token_ids", "token_ids is empty", [](R r) { r->mutable_token_ids(); }},
      {"token_ids", "at most 99 fit",
       [](R r) {
         for (int i = 0; i < 100; ++i) r->mutable_token_ids()->add_ids(7);
       }},
      {"text", "at most 99 fit",
       [](R r) {
         std::string text;
         for (int i = 0; i < 200; ++i) text += " 7";
         r->set_text(text);
       }},
      {"text", "no text above", [](R r) { r->set_text(std::string(10'000'000, 'x')); }},
      {"token_ids.ids[1]", "vocabulary size",
       [](R r) {
         r->mutable_token_ids()->add_ids(7);
         r->mutable_token_ids()->add_ids(1u << 31);
       }},
      {"model", "'demo'", [](R r) { r->set_model("other"); }},
      {"sampling.temperature", "got nan",
       [&](R r) { r->mutable_sampling()->set_temperature(nan); }},
      {"sampling.temperature", "got inf",
       [&](R r) { r->mutable_sampling()->set_temperature(inf); }},
      {"sampling.temperature", ">= 0", [](R r) { r->mutable_sampling()->set_temperature(-1); }},
      {"sampling.top_p", "(0, 1]", [](R r) { r->mutable_sampling()->set_top_p(0); }},
      {"sampling.top_p", "got nan", [&](R r) { r->mutable_sampling()->set_top_p(nan); }},
      {"sampling.top_k", "got -2", [](R r) { r->mutable_sampling()->set_top_k(-2); }},
      {"sampling.min_p", "[0, 1]", [](R r) { r->mutable_sampling()->set_min_p(1.5f); }},
      {"sampling.repetition_penalty", "(0, 10]",
       [](R r) { r->mutable_sampling()->set_repetition_penalty(0); }},
      {"sampling.presence_penalty", "[-2, 2]",
       [](R r) { r->mutable_sampling()->set_presence_penalty(3); }},
      {"sampling.frequency_penalty", "[-2, 2]",
       [&](R r) { r->mutable_sampling()->set_frequency_penalty(-inf); }},
      {"sampling.max_tokens", "at least 1", [](R r) { r->mutable_sampling()->set_max_tokens(0); }},
      {"sampling.max_tokens", "tokens are left behind",
       [](R r) { r->mutable_sampling()->set_max_tokens(100); }},
      {"sampling.min_tokens", "above max_tokens 5",
       [](R r) {
         r->mutable_sampling()->set_max_tokens(5);
         r->mutable_sampling()->set_min_tokens(6);
       }},
      {"sampling.stop[1]", "got 0",
       [](R r) {
         r->mutable_sampling()->add_stop("a");
         r->mutable_sampling()->add_stop("");
       }},
      {"sampling.stop", "at most 16",
       [](R r) {
         for (int i = 0; i < 17; ++i) r->mutable_sampling()->add_stop("a");
       }},
      {"sampling.stop_token_ids[0]", "vocabulary size",
       [](R r) { r->mutable_sampling()->add_stop_token_ids(1u << 20); }},
      {"sampling.logprobs", "at most 20", [](R r) { r->mutable_sampling()->set_logprobs(21); }},
      {"sampling.prompt_logprobs", "at most 20",
       [](R r) { r->mutable_sampling()->set_prompt_logprobs(1000); }},
      {"options.request_id", "printable", [](R r) { r->mutable_options()->set_request_id("a\n"); }},
      {"options.request_id", "129",
       [](R r) { r->mutable_options()->set_request_id(std::string(129, 'a')); }},
      {"options.cache_salt", "257",
       [](R r) { r->mutable_options()->set_cache_salt(std::string(257, 'a')); }},
      {"options.cache_salt", "U+0001",
       [](R r) {
         r->mutable_options()->set_cache_salt(
             "\x01"
             "acme\x01");
       }},
  };
  for (const BadCase& bad : cases) {
    v1::GenerateRequest message;
    message.set_text("hello");
    bad.change(&message);
    const absl::Status status = Read(message).status();
    SCOPED_TRACE(bad.field + ": " + bad.message);
    EXPECT_EQ(status.code(), bad.field == "model" ? absl::StatusCode::kNotFound
                                                  : absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), HasSubstr(bad.message));
    const std::vector<FieldViolation> violations = FieldViolations(status);
    ASSERT_EQ(violations.size(), 1u);
    EXPECT_EQ(violations[0].field, bad.field);
  }
}

TEST(RequestWire, TheTenantOfAKeySaltsTheCacheHereAndInTheWorkers) {
  const auto salt = [](const std::string& tenant, const std::string& given) {
    RequestLimits limits = Limits();
    limits.tenant = tenant;
    v1::GenerateRequest message;
    message.set_text("hello");
    message.mutable_options()->set_cache_salt(given);
    const auto request = Read(message, Demo(), limits);
    EXPECT_OK(request);
    EXPECT_EQ(request->cache_salt, request->message->cache_salt());
    return request->cache_salt;
  };
  EXPECT_EQ(salt("", ""), "") << "without a tenant nothing changes";
  EXPECT_EQ(salt("", "mine"), "mine");
  const std::set<std::string> salts = {salt("", ""),   salt("", "a"),  salt("a", ""),
                                       salt("a", "a"), salt("aa", ""), salt("b", "a"),
                                       salt("b", ""),  salt("", "b")};
  EXPECT_EQ(salts.size(), 8u) << "all differ";
  EXPECT_EQ(salt("a", "a"), salt("a", "a"));
}

TEST(RequestWire, AKeyBoundsThePriorityFromAbove) {
  RequestLimits limits = Limits();
  limits.key_max_priority = 0;
  v1::GenerateRequest message;
  message.set_text("hello");
  EXPECT_OK(Read(message, Demo(), limits));
  message.mutable_options()->set_priority(-2);
  EXPECT_OK(Read(message, Demo(), limits));
  message.mutable_options()->set_priority(1);
  const absl::Status refused = Read(message, Demo(), limits).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kPermissionDenied);
  ASSERT_EQ(FieldViolations(refused).size(), 1u);
  EXPECT_EQ(FieldViolations(refused)[0].field, "options.priority");
}

TEST(RequestWire, FillsWhatIsUnset) {
  ServedModel model = Demo();
  model.defaults = {};
  model.defaults.temperature = 0.5;
  model.defaults.top_k = 20;
  v1::GenerateRequest message;
  message.set_text("hello");
  message.mutable_sampling()->set_top_p(0.25f);
  message.mutable_sampling()->add_stop("x");
  auto request = Read(message, model);
  ASSERT_OK(request);
  const v1::SamplingParams& sampling = request->message->sampling();
  EXPECT_EQ(sampling.temperature(), 0.5f);
  EXPECT_EQ(sampling.top_k(), 20);
  EXPECT_EQ(sampling.top_p(), 0.25f);
  EXPECT_EQ(sampling.repetition_penalty(), 1);
  EXPECT_TRUE(sampling.has_seed());
  EXPECT_EQ(sampling.max_tokens(), kMaxModelLen - request->tokens.size());
  EXPECT_EQ(sampling.stop_size(), 0);  // stop strings stay in the router
  EXPECT_THAT(request->stop, ElementsAre("x"));
  EXPECT_EQ(request->id.size(), 32u);

  model.defaults.do_sample = false;
  model.defaults.max_new_tokens = 10;
  request = Read(message, model);
  ASSERT_OK(request);
  EXPECT_EQ(request->message->sampling().temperature(), 0);
  EXPECT_EQ(request->max_tokens, 10);
}

TEST(RequestWire, WithoutATokenizerOnlyTokenIdsWork) {
  ServedModel model = Demo();
  model.tokenizer = nullptr;
  v1::GenerateRequest message;
  message.set_text("hello");
  const absl::Status status = Read(message, model).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("send token_ids"));
  message.mutable_token_ids()->add_ids(7);
  EXPECT_OK(Read(message, model));
}

TEST(RequestWire, ChatErrorsNameTheMessage) {
  v1::ChatRequest chat;
  EXPECT_EQ(FieldViolations(ReadChat(chat).status()).at(0).field, "messages");
  v1::ChatMessage* message = chat.add_messages();
  message->set_role("user");
  message->set_content("hi");
  EXPECT_OK(ReadChat(chat));
  chat.add_messages()->set_role("boss");
  EXPECT_EQ(FieldViolations(ReadChat(chat).status()).at(0).field, "messages[1].role");
  chat.mutable_messages()->RemoveLast();
  v1::Tool* tool = chat.add_tools();
  EXPECT_EQ(FieldViolations(ReadChat(chat).status()).at(0).field, "tools[0].function.name");
  tool->mutable_function()->set_name("f");
  tool->mutable_function()->set_parameters("[1]");
  EXPECT_EQ(FieldViolations(ReadChat(chat).status()).at(0).field, "tools[0].function.parameters");
  tool->mutable_function()->set_parameters("{\"type\":\"object\"}");
  RequestLimits limits = Limits();
  limits.max_model_len = 2048;
  const auto prompt = TokenizeChat(Demo(), limits, chat, "");
  ASSERT_OK(prompt);
  EXPECT_THAT(prompt->text, HasSubstr(R"({"type": "function", "function": {"name": "f", )"
                                      R"("description": "", "parameters": {"type": "object"}}})"));
}

TEST(RequestWire, SpecialTokensTypedInChatArePlainText) {
  v1::ChatRequest chat;
  chat.add_messages()->set_role("user");
  chat.mutable_messages(0)->set_content("<|im_end|>");
  const auto typed = ReadChat(chat);
  chat.mutable_messages(0)->set_content("x");
  const auto plain = ReadChat(chat);
  ASSERT_OK(typed);
  ASSERT_OK(plain);
  const auto count = [](const Request& request) {
    const int32_t end = *Demo().tokenizer->TokenToId("<|im_end|>");
    return std::count(request.tokens.begin(), request.tokens.end(), end);
  };
  EXPECT_EQ(count(*typed), count(*plain));
}

TEST(RequestWire, NormalisedPromptsAreEqual) {
  RequestLimits limits = Limits();
  limits.normalize_prompts = true;
  const auto a = TokenizeText(Demo(), limits, "caf\xC3\xA9 \r\nend");
  const auto b = TokenizeText(Demo(), limits, "cafe\xCC\x81\nend");
  ASSERT_OK(a);
  ASSERT_OK(b);
  EXPECT_EQ(a->ids, b->ids);
}

// What goes to the decode worker convinces the prefill worker of its KV address, and of no other.
TEST(ResponseWire, VouchesForTheKvAddressToEachPrefillWorker) {
  v1::GenerateRequest message;
  message.mutable_token_ids()->add_ids(1);
  const Request request = Read(message).value();
  Route route;
  route.decode = {.id = "d0", .address = "d:1", .kv_address = "d:2"};
  route.prefill = {{.id = "p0", .address = "p:1", .vouch_key = "key 0"},
                   {.id = "p1", .address = "p:2", .vouch_key = "key 1", .return_address = "p:9"}};
  internal::v1::DecodeRequest out;
  DecodeRequestToProto(route, request, {}, &out);
  VoucherCheck first, second;
  first.SetKey("r0", "key 0");
  second.SetKey("r0", "key 1");
  EXPECT_EQ(out.route().prefill(0).return_address(), "");
  EXPECT_EQ(out.route().prefill(1).return_address(), "p:9");
  const std::string voucher = out.route().prefill(0).voucher();
  EXPECT_OK(first.Check("d0", "d:2", voucher));
  EXPECT_FALSE(first.Check("d0", "d:3", voucher).ok());
  EXPECT_FALSE(first.Check("d1", "d:2", voucher).ok());
  EXPECT_FALSE(second.Check("d0", "d:2", voucher).ok());
  EXPECT_OK(second.Check("d0", "d:2", out.route().prefill(1).voucher()));
}

// The prompt lies in the request alone, and is in the message while that is on its way.
TEST(ResponseWire, TokensAreThePromptAndWhatWasGenerated) {
  v1::GenerateRequest message;
  for (const uint32_t id : {5, 6, 7}) message.mutable_token_ids()->add_ids(id);
  message.mutable_sampling()->set_prompt_logprobs(1);
  const Request request = Read(message).value();
  EXPECT_EQ(request.message->token_ids_size(), 0);
  internal::v1::DecodeRequest out;
  DecodeRequestToProto({}, request, {}, &out);
  EXPECT_THAT(out.token_ids(), ElementsAre(5, 6, 7));
  EXPECT_EQ(out.prompt_length(), 0u);
  const std::vector<int32_t> generated = {8, 9};
  DecodeRequestToProto({}, request, generated, &out);
  EXPECT_THAT(out.token_ids(), ElementsAre(5, 6, 7, 8, 9));
  EXPECT_EQ(out.prompt_length(), 3u);
  EXPECT_FALSE(out.sampling().has_prompt_logprobs());
}

std::optional<int> PriorityIn(const google::protobuf::Message& message) {
  return PriorityOf(SerializeMessage(message));
}

TEST(RequestWire, ThePriorityIsFoundWithoutReadingTheMessage) {
  v1::GenerateRequest generate;
  generate.set_text(std::string(100'000, 'a'));
  EXPECT_EQ(PriorityIn(generate), 0);
  generate.mutable_options()->set_request_id("one");
  EXPECT_EQ(PriorityIn(generate), 0);
  for (const int priority : {2, -1, INT_MAX, INT_MIN}) {
    generate.mutable_options()->set_priority(priority);
    generate.mutable_options()->set_cache_salt("salt");
    EXPECT_EQ(PriorityIn(generate), priority);
  }
  v1::ChatRequest chat;
  for (int i = 0; i < 100; ++i) chat.add_messages()->set_content("hello");
  chat.mutable_options()->set_priority(1);
  EXPECT_EQ(PriorityIn(chat), 1);
  for (int i = 0; i < 10'000; ++i) chat.add_messages();
  EXPECT_EQ(PriorityIn(chat), std::nullopt) << "ten thousand fields are looked at later";
}

TEST(RequestWire, NoPriorityIsFoundInWhatIsNoMessage) {
  v1::GenerateRequest message;
  message.mutable_options()->set_cache_salt("salt");
  message.mutable_options()->set_priority(2);
  const std::string bytes = message.SerializeAsString();
  for (size_t length = 1; length < bytes.size(); ++length) {
    const grpc::Slice slice(bytes.data(), length);
    EXPECT_EQ(PriorityOf(grpc::ByteBuffer(&slice, 1)), std::nullopt) << length;
  }
  const grpc::Slice noise(std::string("\xFF\xFF\xFF"));
  EXPECT_EQ(PriorityOf(grpc::ByteBuffer(&noise, 1)), std::nullopt);
}

TEST(MessageWire, InvalidUtf8NamesFieldAndByte) {
  // 0x12 = field 2 (text), 5 bytes.
  const std::string text = std::string("\x12\x05") + "ab\xFF" + "cd";
  v1::GenerateRequest generate;
  const absl::Status status = ParseMessageBytes(text, &generate);
  EXPECT_EQ(std::string(status.message()), "text is not valid UTF-8 at byte 2");
  EXPECT_EQ(FieldViolations(status).at(0).field, "text");

  v1::ChatRequest chat;
  chat.add_messages()->set_role("user");
  chat.add_messages()->set_content("good");
  std::string bytes = chat.SerializeAsString();
  bytes.replace(bytes.find("good"), 4, "\xC3(xx");
  EXPECT_EQ(FieldViolations(ParseMessageBytes(bytes, &chat)).at(0).field, "messages[1].content");
  EXPECT_EQ(ParseMessageBytes("\xFF\xFF\xFF", &chat).code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace tandem::router
