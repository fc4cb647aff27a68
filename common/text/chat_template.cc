#include "common/text/chat_template.h"

#include <utility>

#include "common/base/file.h"
#include "common/base/status.h"
#include "common/text/jinja/json_value.h"
#include "common/text/json.h"
#include "common/text/utf8.h"

namespace tandem {
namespace {

using jinja::Dict;
using jinja::List;
using jinja::Text;
using jinja::Value;

constexpr size_t kMaxTemplateFileBytes = size_t{16} << 20;

// Values of a conversation: names and roles are the template's, all else is data.
Value Known(std::string_view text) { return Value(Text(text)); }
Value Data(std::string_view text) { return Value(Text(text, /*data=*/true)); }

absl::Status CheckText(const std::string& text, const std::string& field) {
  const auto bad = FindInvalidUtf8(text);
  if (!bad.has_value()) return absl::OkStatus();
  return InvalidArgument("{} is not valid UTF-8 at byte {}", field, *bad);
}

absl::StatusOr<Value> ReadObject(const std::string& json, const std::string& field) {
  TANDEM_ASSIGN_OR_RETURN(Value value, jinja::FromJson(json, field));
  if (value.dict() == nullptr) return InvalidArgument("{} must be a JSON object", field);
  return value;
}

absl::Status CheckRole(const ChatMessage& message, const std::string& path, bool has_tools) {
  const std::string& role = message.role;
  if (role != "system" && role != "user" && role != "assistant" && role != "tool") {
    return InvalidArgument("{}.role must be system, user, assistant or tool, got \"{}\"", path,
                           FindInvalidUtf8(role).has_value() ? "(not UTF-8)" : role.substr(0, 40));
  }
  if (role == "tool" && !has_tools) {
    return InvalidArgument("{}.role is tool, but this model's chat template has no tools", path);
  }
  if (message.tool_calls.empty()) return absl::OkStatus();
  if (role != "assistant") {
    return InvalidArgument("{}.tool_calls: only an assistant message may have them, not role {}",
                           path, role);
  }
  if (!has_tools) {
    return InvalidArgument("{}.tool_calls: this model's chat template has no tools", path);
  }
  return absl::OkStatus();
}

absl::StatusOr<Value> ReadToolCall(const ChatToolCall& call, const std::string& path) {
  if (call.name.empty()) return InvalidArgument("{}.function.name must not be empty", path);
  TANDEM_RETURN_IF_ERROR(CheckText(call.name, path + ".function.name"));
  TANDEM_RETURN_IF_ERROR(CheckText(call.id, path + ".id"));
  TANDEM_ASSIGN_OR_RETURN(Value arguments,
                          ReadObject(call.arguments_json, path + ".function.arguments"));
  Dict function;
  function.Set(Text("name"), Data(call.name));
  function.Set(Text("arguments"), std::move(arguments));
  Dict value;
  value.Set(Text("type"), Known("function"));
  if (!call.id.empty()) value.Set(Text("id"), Data(call.id));
  value.Set(Text("function"), Value(std::move(function)));
  return Value(std::move(value));
}

absl::StatusOr<Value> ReadMessage(const ChatMessage& message, const std::string& path,
                                  bool has_tools) {
  TANDEM_RETURN_IF_ERROR(CheckRole(message, path, has_tools));
  Dict value;
  value.Set(Text("role"), Known(message.role));
  const std::pair<const char*, const std::string&> fields[] = {
      {"content", message.content}, {"tool_call_id", message.tool_call_id}, {"name", message.name}};
  for (const auto& [key, text] : fields) {
    TANDEM_RETURN_IF_ERROR(CheckText(text, path + "." + key));
    const bool always = std::string_view(key) == "content";
    if (always || !text.empty()) value.Set(Text(key), Data(text));
  }
  List calls;
  for (size_t i = 0; i < message.tool_calls.size(); ++i) {
    TANDEM_ASSIGN_OR_RETURN(
        Value call, ReadToolCall(message.tool_calls[i], fmt::format("{}.tool_calls[{}]", path, i)));
    calls.push_back(std::move(call));
  }
  if (!calls.empty()) value.Set(Text("tool_calls"), Value(std::move(calls)));
  return Value(std::move(value));
}

// Runs of equal marks as segments.
std::vector<TextSegment> ToSegments(const Text& text) {
  std::vector<TextSegment> segments;
  for (size_t begin = 0, end = 0; begin < text.size(); begin = end) {
    while (end < text.size() && text.IsData(end) == text.IsData(begin)) ++end;
    segments.push_back({std::string(text.chars().substr(begin, end - begin)), !text.IsData(begin)});
  }
  return segments;
}

// The source in a tokenizer_config.json's `chat_template`; nullopt if there is none.
absl::StatusOr<std::optional<std::string>> FindSource(const nlohmann::json& config) {
  constexpr std::string_view kField = "tokenizer_config.json: chat_template";
  const auto it = config.find("chat_template");
  if (it == config.end() || it->is_null()) return std::nullopt;
  if (it->is_string()) return it->get<std::string>();
  if (!it->is_array()) return InvalidArgument("{}: must be a string or a list", kField);
  // Several named templates; the one called "default" is for chats.
  for (const nlohmann::json& entry : *it) {
    if (!entry.is_object() || entry.value("name", nlohmann::json()) != "default") continue;
    const auto source = entry.find("template");
    if (source != entry.end() && source->is_string()) return source->get<std::string>();
  }
  return InvalidArgument("{}: the list has no template named \"default\"", kField);
}

// "bos_token": "<s>" or {"content": "<s>"}, and its like.
ChatTemplate::SpecialTokens FindSpecialTokens(const nlohmann::json& config) {
  ChatTemplate::SpecialTokens tokens;
  for (const auto& [key, value] : config.items()) {
    if (!std::string_view(key).ends_with("_token")) continue;
    const nlohmann::json content =
        value.is_object() ? value.value("content", nlohmann::json()) : value;
    if (content.is_string()) tokens[key] = content.get<std::string>();
  }
  return tokens;
}

absl::StatusOr<nlohmann::json> ParseTokenizerConfig(std::string_view text) {
  TANDEM_ASSIGN_OR_RETURN(nlohmann::json config, ParseJson(text, "tokenizer_config.json"));
  if (!config.is_object()) return InvalidArgument("tokenizer_config.json: must be a JSON object");
  return config;
}

}  // namespace

absl::StatusOr<ChatTemplate> ChatTemplate::FromJinja(std::string_view source,
                                                     SpecialTokens special_tokens) {
  if (source.find_first_not_of(" \t\r\n") == std::string_view::npos) {
    return InvalidArgument("the model's chat_template is empty");
  }
  if (const auto bad = FindInvalidUtf8(source); bad.has_value()) {
    return InvalidArgument("the model's chat_template is not valid UTF-8 at byte {}", *bad);
  }
  absl::StatusOr<jinja::Template> parsed = jinja::Template::Parse(source);
  if (!parsed.ok()) {
    return InvalidArgument("the model's chat_template cannot be used: {}",
                           MessageOf(parsed.status()));
  }
  ChatTemplate result;
  result.template_ = *std::move(parsed);
  result.special_tokens_ = std::move(special_tokens);
  return result;
}

absl::StatusOr<ChatTemplate> ChatTemplate::FromTokenizerConfig(
    std::string_view tokenizer_config_json) {
  TANDEM_ASSIGN_OR_RETURN(const nlohmann::json config, ParseTokenizerConfig(tokenizer_config_json));
  TANDEM_ASSIGN_OR_RETURN(const auto source, FindSource(config));
  if (!source.has_value()) return ChatTemplate();
  auto result = FromJinja(*source, FindSpecialTokens(config));
  if (!result.ok()) {
    return InvalidArgument("tokenizer_config.json: {}", MessageOf(result.status()));
  }
  return result;
}

absl::StatusOr<ChatTemplate> ChatTemplate::Load(const std::string& model_dir) {
  const auto with_path = [](const std::string& path, const absl::Status& status) {
    return absl::Status(status.code(), fmt::format("{}: {}", path, MessageOf(status)));
  };
  const std::string jinja = model_dir + "/chat_template.jinja";
  const std::string config = model_dir + "/tokenizer_config.json";
  std::string config_text = "{}";
  if (FileExists(config)) {
    TANDEM_ASSIGN_OR_RETURN(config_text, ReadFile(config, kMaxTemplateFileBytes));
  }
  if (!FileExists(jinja)) {
    absl::StatusOr<ChatTemplate> result = FromTokenizerConfig(config_text);
    return result.ok() ? std::move(result) : with_path(config, result.status());
  }
  const absl::StatusOr<nlohmann::json> parsed = ParseTokenizerConfig(config_text);
  if (!parsed.ok()) return with_path(config, parsed.status());
  TANDEM_ASSIGN_OR_RETURN(const std::string source, ReadFile(jinja, kMaxTemplateFileBytes));
  absl::StatusOr<ChatTemplate> result = FromJinja(source, FindSpecialTokens(*parsed));
  return result.ok() ? std::move(result) : with_path(jinja, result.status());
}

absl::StatusOr<std::vector<TextSegment>> ChatTemplate::Render(std::span<const ChatMessage> messages,
                                                              std::span<const std::string> tools,
                                                              bool add_generation_prompt,
                                                              absl::Time now) const {
  if (!has_template()) {
    return FailedPrecondition(
        "this model has no chat template, so it cannot chat; send its prompt as text instead");
  }
  if (messages.empty()) return InvalidArgument("messages must not be empty");
  if (!tools.empty() && !has_tools()) {
    return InvalidArgument("tools: this model's chat template has no tools");
  }
  List message_values, tool_values;
  for (size_t i = 0; i < messages.size(); ++i) {
    TANDEM_ASSIGN_OR_RETURN(Value message,
                            ReadMessage(messages[i], fmt::format("messages[{}]", i), has_tools()));
    message_values.push_back(std::move(message));
  }
  for (size_t i = 0; i < tools.size(); ++i) {
    TANDEM_ASSIGN_OR_RETURN(Value tool, ReadObject(tools[i], fmt::format("tools[{}]", i)));
    tool_values.push_back(std::move(tool));
  }
  Dict variables;
  for (const auto& [name, token] : special_tokens_) variables.Set(Text(name), Known(token));
  variables.Set(Text("messages"), Value(std::move(message_values)));
  variables.Set(Text("tools"),
                tools.empty() ? Value(jinja::None{}) : Value(std::move(tool_values)));
  variables.Set(Text("documents"), Value(jinja::None{}));
  variables.Set(Text("add_generation_prompt"), Value(add_generation_prompt));
  const absl::StatusOr<Text> rendered = template_->Render(variables, now);
  if (!rendered.ok()) {
    return InvalidArgument("messages: this model's chat template refuses them: {}",
                           MessageOf(rendered.status()));
  }
  return ToSegments(*rendered);
}

}  // namespace tandem
