#include "router/api/request_wire.h"

#include <algorithm>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <utility>

#include "google/protobuf/io/coded_stream.h"
#include "google/protobuf/wire_format_lite.h"
#include "grpcpp/support/proto_buffer_reader.h"
#include "nlohmann/json.hpp"

#include "common/base/block_hash.h"
#include "common/base/status.h"
#include "common/base/transfer_id.h"
#include "common/rpc/status.h"
#include "common/text/json.h"
#include "common/text/normalize.h"
#include "router/api/sampling_wire.h"
#include "tandem/internal/v1/decode.pb.h"

namespace tandem::router {
namespace {

constexpr size_t kMaxRequestIdBytes = 128;
constexpr size_t kMaxOptionBytes = 256;
constexpr int kMaxMessages = 10000;
constexpr int kMaxTools = 1000;
// That PriorityOf passes over.
constexpr int kMaxFields = 1000;

// Begins the salts of tenants; no client's own salt may begin so, or it could name another tenant.
constexpr char kTenantMark = '\x01';

// The field that a message of common/text begins with: "messages[2].role must be ...".
std::string FieldOf(const absl::Status& status) {
  const std::string message = MessageOf(status);
  return message.substr(0, message.find_first_of(" :"));
}

std::string Hex128(const std::string& bytes) {
  Hash128 value;
  Hash128::FromBytes(bytes, &value);
  return value.ToHex();
}

bool IsPrintable(char c) { return c > ' ' && c < 127; }

bool IsRequestId(const std::string& id) {
  return id.size() <= kMaxRequestIdBytes && std::all_of(id.begin(), id.end(), IsPrintable);
}

absl::Status CheckOptions(const RequestLimits& limits, const v1::RequestOptions& options) {
  const std::string& id = options.request_id();
  if (!IsRequestId(id)) {
    return BadField("options.request_id",
                    "must be at most {} printable ASCII characters without blanks, got {} bytes",
                    kMaxRequestIdBytes, id.size());
  }
  const auto check = [](const char* name, const std::string& value) {
    if (value.size() <= kMaxOptionBytes) return absl::OkStatus();
    return BadField(name, "must have at most {} bytes, got {}", kMaxOptionBytes, value.size());
  };
  TANDEM_RETURN_IF_ERROR(check("options.cache_salt", options.cache_salt()));
  if (options.cache_salt().starts_with(kTenantMark)) {
    return BadField("options.cache_salt", "must not begin with the character U+0001");
  }
  if (limits.key_max_priority.has_value() && options.priority() > *limits.key_max_priority) {
    return WithField(
        PermissionDenied("options.priority must be at most {} with this API key, got {}",
                         *limits.key_max_priority, options.priority()),
        "options.priority");
  }
  return check("options.session_id", options.session_id());
}

// What keeps the cached prefixes of tenants apart, and within a tenant those of the client's salts:
// it goes into the block hashes here and in the workers.
std::string SaltOf(const RequestLimits& limits, const std::string& given) {
  if (limits.tenant.empty()) return given;
  return fmt::format("{}{}{}{}", kTenantMark, limits.tenant, kTenantMark, given);
}

// Text that cannot fit whatever it says is refused before any work goes into it. NFC shortens to a
// third at most, so a text of n bytes has at least n / (3 * longest token) tokens.
absl::Status CheckTextBytes(const ServedModel& model, const RequestLimits& limits, size_t bytes,
                            const std::string& field) {
  const size_t fits =
      3 * model.tokenizer->max_token_bytes() * static_cast<size_t>(limits.max_model_len);
  if (bytes > fits) {
    return BadField(field,
                    "has {} bytes; no text above {} bytes can fit into max_model_len, {} tokens; "
                    "shorten it",
                    bytes, fits, limits.max_model_len);
  }
  if (bytes > limits.max_prompt_bytes) {
    return BadField(field, "has {} bytes; the router takes at most {} (--max-prompt-bytes)", bytes,
                    limits.max_prompt_bytes);
  }
  return absl::OkStatus();
}

absl::Status NoTokenizer(const ServedModel& model) {
  return FailedPrecondition("model '{}' has no tokenizer.json; send token_ids", model.name);
}

absl::Status CheckPromptLength(const RequestLimits& limits, size_t tokens,
                               const std::string& field) {
  if (tokens < static_cast<size_t>(limits.max_model_len)) return absl::OkStatus();
  return BadField(field,
                  "has {} tokens; with max_model_len {} at most {} fit, one must remain for the "
                  "answer; shorten the prompt",
                  tokens, limits.max_model_len, limits.max_model_len - 1);
}

absl::StatusOr<std::vector<int32_t>> TokenIdsFromProto(const ServedModel& model,
                                                       const RequestLimits& limits,
                                                       const v1::TokenIds& message) {
  TANDEM_RETURN_IF_ERROR(
      CheckPromptLength(limits, static_cast<size_t>(message.ids_size()), "token_ids"));
  std::vector<int32_t> ids;
  ids.reserve(static_cast<size_t>(message.ids_size()));
  for (int i = 0; i < message.ids_size(); ++i) {
    if (message.ids(i) >= static_cast<uint32_t>(model.config.vocab_size)) {
      return BadField(fmt::format("token_ids.ids[{}]", i),
                      "must be below the vocabulary size {}, got {}", model.config.vocab_size,
                      message.ids(i));
    }
    ids.push_back(static_cast<int32_t>(message.ids(i)));
  }
  return ids;
}

// A tool as the template shall show it.
absl::StatusOr<std::string> ToolFromProto(const v1::Tool& tool, const std::string& field) {
  if (!tool.json().empty()) return tool.json();
  const v1::FunctionDefinition& function = tool.function();
  if (!tool.type().empty() && tool.type() != "function") {
    return BadField(field + ".type", "must be function, got '{}'", tool.type());
  }
  if (function.name().empty()) {
    return BadField(field + ".function.name", "must not be empty");
  }
  std::string parameters = "{}";
  if (!function.parameters().empty()) {
    const std::string what = field + ".function.parameters";
    const absl::StatusOr<std::string> json = ToPythonJson(function.parameters(), what);
    if (!json.ok()) return WithField(json.status(), what);
    if (json->empty() || json->front() != '{') {
      return BadField(what, "must be a JSON object");
    }
    parameters = *json;
  }
  const auto quote = [](const std::string& text) { return nlohmann::json(text).dump(); };
  return fmt::format(
      R"({{"type": "function", "function": {{"name": {}, "description": {}, "parameters": {}}}}})",
      quote(function.name()), quote(function.description()), parameters);
}

ChatMessage ChatMessageFromProto(const v1::ChatMessage& message) {
  ChatMessage out;
  out.role = message.role();
  out.content = message.content();
  out.tool_call_id = message.tool_call_id();
  out.name = message.name();
  for (const v1::ToolCall& call : message.tool_calls()) {
    out.tool_calls.push_back({call.id(), call.function().name(), call.function().arguments()});
  }
  return out;
}

absl::Status CheckMessages(const v1::ChatRequest& request, const std::string& prefix) {
  if (request.messages_size() > kMaxMessages || request.tools_size() > kMaxTools) {
    const bool messages = request.messages_size() > kMaxMessages;
    return BadField(prefix + (messages ? "messages" : "tools"),
                    "must have at most {} entries, got {}", messages ? kMaxMessages : kMaxTools,
                    messages ? request.messages_size() : request.tools_size());
  }
  for (int i = 0; i < request.messages_size(); ++i) {
    for (int j = 0; j < request.messages(i).tool_calls_size(); ++j) {
      const std::string& type = request.messages(i).tool_calls(j).type();
      if (type.empty() || type == "function") continue;
      return BadField(fmt::format("{}messages[{}].tool_calls[{}].type", prefix, i, j),
                      "must be function, got '{}'", type);
    }
  }
  return absl::OkStatus();
}

// Everything behind the prompt. `field` names the prompt.
absl::StatusOr<Request> Finish(const ServedModel& model, const RequestLimits& limits,
                               std::vector<int32_t> tokens, const v1::SamplingParams& sampling,
                               const v1::RequestOptions& options, const std::string& field) {
  if (tokens.empty()) {
    return BadField(field, "is empty: give at least one token");
  }
  TANDEM_RETURN_IF_ERROR(CheckPromptLength(limits, tokens.size(), field));
  const int room = limits.max_model_len - static_cast<int>(tokens.size());
  TANDEM_RETURN_IF_ERROR(CheckSampling(model, room, sampling));
  auto message = std::make_shared<internal::v1::DecodeRequest>();
  *message->mutable_sampling() = sampling;
  FillSamplingDefaults(model, room, message->mutable_sampling());
  Request request;
  request.id = RequestIdFrom(options.request_id());
  request.session_id = options.session_id();
  request.max_tokens = static_cast<int>(message->sampling().max_tokens());
  request.min_tokens = static_cast<int>(sampling.min_tokens());
  request.stop.assign(sampling.stop().begin(), sampling.stop().end());
  request.cache_salt = SaltOf(limits, options.cache_salt());
  request.priority = std::clamp(options.priority(), -limits.max_priority, limits.max_priority);
  // Stop strings are text: they stay here.
  message->mutable_sampling()->clear_stop();
  message->set_request_id(request.id);
  message->mutable_eos_token_ids()->Add(model.eos_token_ids.begin(), model.eos_token_ids.end());
  message->set_cache_salt(request.cache_salt);
  message->set_priority(request.priority);
  message->set_progress(options.progress());
  request.tokens = std::move(tokens);
  request.message = std::move(message);
  return request;
}

}  // namespace

std::optional<int> PriorityOf(const grpc::ByteBuffer& bytes) {
  using google::protobuf::internal::WireFormatLite;
  constexpr int kOptions = v1::GenerateRequest::kOptionsFieldNumber;
  static_assert(kOptions == v1::ChatRequest::kOptionsFieldNumber);
  grpc::ByteBuffer shared = bytes;  // the reader wants one that is not const
  grpc::ProtoBufferReader reader(&shared);
  google::protobuf::io::CodedInputStream in(&reader);
  int priority = 0;
  // Within the message, and then within its options.
  const auto read = [&](const auto& self, bool options, int* fields) -> bool {
    while (const uint32_t tag = in.ReadTag()) {
      if (--*fields < 0) return false;
      const int field = WireFormatLite::GetTagFieldNumber(tag);
      const auto type = WireFormatLite::GetTagWireType(tag);
      uint64_t value;
      if (options && field == v1::RequestOptions::kPriorityFieldNumber &&
          type == WireFormatLite::WIRETYPE_VARINT) {
        if (!in.ReadVarint64(&value)) return false;
        priority = static_cast<int32_t>(value);
      } else if (!options && field == kOptions &&
                 type == WireFormatLite::WIRETYPE_LENGTH_DELIMITED) {
        int length;
        if (!in.ReadVarintSizeAsInt(&length)) return false;
        const auto outer = in.PushLimit(length);
        if (!self(self, true, fields) || in.BytesUntilLimit() != 0) return false;
        in.PopLimit(outer);
      } else if (!WireFormatLite::SkipField(&in, tag)) {
        return false;
      }
    }
    return in.ConsumedEntireMessage();
  };
  int fields = kMaxFields;
  if (!read(read, false, &fields)) return std::nullopt;
  return priority;
}

absl::Status CheckModelName(const ServedModel& model, const std::string& name) {
  if (name.empty() || name == model.name) return absl::OkStatus();
  return WithField(
      NotFound("model '{}' is not served here; this cluster serves '{}'", name, model.name),
      "model");
}

std::string RequestIdFrom(std::string_view given) {
  std::string id;
  for (const char c : given) {
    const std::string next =
        IsPrintable(c) ? std::string(1, c) : fmt::format("%{:02X}", static_cast<unsigned char>(c));
    if (id.size() + next.size() > kMaxRequestIdBytes) break;
    id += next;
  }
  return id.empty() ? Hex128(RandomBytes(16)) : id;
}

void SettleRequestId(v1::RequestOptions* options, std::string* id) {
  if (options->request_id().empty()) {
    options->set_request_id(*id);
  } else if (IsRequestId(options->request_id())) {
    *id = options->request_id();
  }
}

absl::StatusOr<TokenizedPrompt> TokenizeText(const ServedModel& model, const RequestLimits& limits,
                                             const std::string& text) {
  if (model.tokenizer == nullptr) return NoTokenizer(model);
  TANDEM_RETURN_IF_ERROR(CheckTextBytes(model, limits, text.size(), "text"));
  TokenizedPrompt out{{}, text};
  if (limits.normalize_prompts) {
    absl::StatusOr<std::string> normal = NormalizePrompt(text);
    if (!normal.ok()) return WithField(normal.status(), "text");
    out.text = *std::move(normal);
  }
  const auto append = [&](std::span<const int32_t> ids) {
    out.ids.insert(out.ids.end(), ids.begin(), ids.end());
  };
  append(model.tokenizer->prefix_ids());
  const absl::Status encoded = model.tokenizer->Encode(out.text, /*parse_special=*/true, &out.ids);
  if (!encoded.ok()) return WithField(encoded, "text");
  append(model.tokenizer->suffix_ids());
  return out;
}

absl::StatusOr<TokenizedPrompt> TokenizeChat(const ServedModel& model, const RequestLimits& limits,
                                             const v1::ChatRequest& request,
                                             const std::string& prefix) {
  if (model.tokenizer == nullptr) return NoTokenizer(model);
  TANDEM_RETURN_IF_ERROR(CheckMessages(request, prefix));
  size_t bytes = 0;
  std::vector<ChatMessage> messages;
  std::vector<std::string> tools;
  for (const v1::ChatMessage& message : request.messages()) {
    bytes += message.content().size();
    for (const v1::ToolCall& call : message.tool_calls()) bytes += call.ByteSizeLong();
    messages.push_back(ChatMessageFromProto(message));
  }
  for (int i = 0; i < request.tools_size(); ++i) {
    TANDEM_ASSIGN_OR_RETURN(std::string tool,
                            ToolFromProto(request.tools(i), fmt::format("{}tools[{}]", prefix, i)));
    bytes += tool.size();
    tools.push_back(std::move(tool));
  }
  TANDEM_RETURN_IF_ERROR(CheckTextBytes(model, limits, bytes, prefix + "messages"));
  absl::StatusOr<std::vector<TextSegment>> segments =
      model.chat_template.Render(messages, tools, /*add_generation_prompt=*/true);
  if (!segments.ok()) {
    if (!absl::IsInvalidArgument(segments.status())) return segments.status();
    return WithField(segments.status(), prefix + FieldOf(segments.status()));
  }
  TokenizedPrompt out;
  for (TextSegment& segment : *segments) {
    // The template's own text is normal already, and a blank at its end is part of it.
    if (limits.normalize_prompts && !segment.parse_special) {
      absl::StatusOr<std::string> normal = NormalizePrompt(segment.text);
      if (!normal.ok()) return WithField(normal.status(), prefix + "messages");
      segment.text = *std::move(normal);
    }
    out.text += segment.text;
  }
  const absl::Status encoded = model.tokenizer->Encode(*segments, &out.ids);
  if (!encoded.ok()) return WithField(encoded, prefix + "messages");
  return out;
}

absl::StatusOr<Request> GenerateRequestFromProto(const ServedModel& model,
                                                 const RequestLimits& limits,
                                                 const v1::GenerateRequest& message,
                                                 absl::Time received, absl::Time deadline,
                                                 Clock* clock) {
  TANDEM_RETURN_IF_ERROR(CheckModelName(model, message.model()));
  TANDEM_RETURN_IF_ERROR(CheckOptions(limits, message.options()));
  std::vector<int32_t> tokens;
  std::string field = "prompt";
  if (message.has_token_ids()) {
    field = "token_ids";
    TANDEM_ASSIGN_OR_RETURN(tokens, TokenIdsFromProto(model, limits, message.token_ids()));
  } else if (message.has_text()) {
    field = "text";
    TANDEM_ASSIGN_OR_RETURN(TokenizedPrompt prompt, TokenizeText(model, limits, message.text()));
    tokens = std::move(prompt.ids);
  }
  const absl::Duration tokenize_time = clock->Now() - received;
  TANDEM_ASSIGN_OR_RETURN(Request request, Finish(model, limits, std::move(tokens),
                                                  message.sampling(), message.options(), field));
  request.received = received;
  request.tokenize_time = tokenize_time;
  request.deadline = deadline;
  return request;
}

absl::StatusOr<Request> ChatRequestFromProto(const ServedModel& model, const RequestLimits& limits,
                                             const v1::ChatRequest& message, absl::Time received,
                                             absl::Time deadline, Clock* clock) {
  TANDEM_RETURN_IF_ERROR(CheckModelName(model, message.model()));
  TANDEM_RETURN_IF_ERROR(CheckOptions(limits, message.options()));
  TANDEM_ASSIGN_OR_RETURN(TokenizedPrompt prompt, TokenizeChat(model, limits, message, ""));
  const absl::Duration tokenize_time = clock->Now() - received;
  TANDEM_ASSIGN_OR_RETURN(Request request,
                          Finish(model, limits, std::move(prompt.ids), message.sampling(),
                                 message.options(), "messages"));
  request.received = received;
  request.tokenize_time = tokenize_time;
  request.deadline = deadline;
  return request;
}

}  // namespace tandem::router
