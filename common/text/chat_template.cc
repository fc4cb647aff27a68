#include "common/text/chat_template.h"

#include <iterator>
#include <optional>
#include <utility>

#include "common/base/file.h"
#include "common/base/status.h"
#include "common/text/jinja_shape.h"
#include "common/text/json.h"
#include "common/text/utf8.h"

namespace tandem {
namespace {

constexpr size_t kMaxFileBytes = size_t{16} << 20;
// Stands for the default system message in the sources below.
constexpr std::string_view kHole = "@DEFAULT_SYSTEM@";

// The published templates.
constexpr std::string_view kQwen25Source =
    R"jinja({%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- '@DEFAULT_SYSTEM@' }}
    {%- endif %}
    {{- "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools>\n\nFor each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call><|im_end|>\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\n@DEFAULT_SYSTEM@<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\n<tool_call>\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' }}
        {{- message.content }}
        {{- '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
)jinja";

// Qwen2-*-Instruct and later Qwen1.5-*-Chat.
constexpr std::string_view kQwen2Source =
    R"jinja({% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n@DEFAULT_SYSTEM@<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %})jinja";

// The common ChatML template, without a default system message.
constexpr std::string_view kChatMlSource =
    R"jinja({% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %})jinja";

// Qwen1.5-*-Chat as first published, and Qwen1.5 base models.
constexpr std::string_view kQwen15Source =
    R"jinja({% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n@DEFAULT_SYSTEM@<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content']}}{% if (loop.last and add_generation_prompt) or not loop.last %}{{ '<|im_end|>' + '\n'}}{% endif %}{% endfor %}{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}{{ '<|im_start|>assistant\n' }}{% endif %})jinja";
constexpr std::string_view kQwen15BaseSource =
    R"jinja({% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']}}{% if (loop.last and add_generation_prompt) or not loop.last %}{{ '<|im_end|>' + '\n'}}{% endif %}{% endfor %}{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}{{ '<|im_start|>assistant\n' }}{% endif %})jinja";

constexpr std::string_view kToolsIntro =
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are "
    "provided with function signatures within <tools></tools> XML tags:\n<tools>";
constexpr std::string_view kToolsOutro =
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    "within <tool_call></tool_call> XML tags:\n<tool_call>\n{\"name\": <function-name>, "
    "\"arguments\": <args-json-object>}\n</tool_call><|im_end|>\n";

absl::Status CheckText(const std::string& text, const std::string& field) {
  const auto bad = FindInvalidUtf8(text);
  if (!bad.has_value()) return absl::OkStatus();
  return InvalidArgument("{} is not valid UTF-8 at byte {}", field, *bad);
}

// `text` as Hugging Face's tojson prints it; it must be a JSON object.
absl::StatusOr<std::string> ObjectToJson(const std::string& text, const std::string& field) {
  TANDEM_ASSIGN_OR_RETURN(std::string json, ToPythonJson(text, field));
  if (json.front() != '{') return InvalidArgument("{} must be a JSON object", field);
  return json;
}

// Checks one message and appends the arguments of its tool calls, printed, to `arguments`.
absl::Status CheckMessage(const ChatMessage& message, size_t index, bool tools_supported,
                          std::vector<std::string>* arguments) {
  const std::string path = fmt::format("messages[{}]", index);
  const std::string& role = message.role;
  if (role != "system" && role != "user" && role != "assistant" && role != "tool") {
    return InvalidArgument("{}.role must be system, user, assistant or tool, got \"{}\"", path,
                           FindInvalidUtf8(role).has_value() ? "(not UTF-8)" : role.substr(0, 40));
  }
  TANDEM_RETURN_IF_ERROR(CheckText(message.content, path + ".content"));
  if (role == "tool" && !tools_supported) {
    return InvalidArgument("{}.role is tool, but this model's chat template has no tools", path);
  }
  if (message.tool_calls.empty()) return absl::OkStatus();
  if (role != "assistant") {
    return InvalidArgument("{}.tool_calls: only an assistant message may have them, not role {}",
                           path, role);
  }
  if (!tools_supported) {
    return InvalidArgument("{}.tool_calls: this model's chat template has no tools", path);
  }
  for (size_t j = 0; j < message.tool_calls.size(); ++j) {
    const ChatToolCall& call = message.tool_calls[j];
    const std::string call_path = fmt::format("{}.tool_calls[{}].function", path, j);
    if (call.name.empty()) return InvalidArgument("{}.name must not be empty", call_path);
    TANDEM_RETURN_IF_ERROR(CheckText(call.name, call_path + ".name"));
    TANDEM_ASSIGN_OR_RETURN(std::string json,
                            ObjectToJson(call.arguments_json, call_path + ".arguments"));
    arguments->push_back(std::move(json));
  }
  return absl::OkStatus();
}

// The source in a tokenizer_config.json's `chat_template`; nullopt if there is none.
absl::StatusOr<std::optional<std::string>> FindSource(const nlohmann::json& config) {
  constexpr std::string_view kField = "tokenizer_config.json: chat_template";
  if (!config.is_object()) return InvalidArgument("tokenizer_config.json: must be a JSON object");
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

}  // namespace

// Collects segments; joins neighbours of the same kind.
class SegmentWriter {
 public:
  void Template(std::string_view text) { Append(text, true); }
  void Content(std::string_view text) { Append(text, false); }
  std::vector<TextSegment> Take() { return std::move(segments_); }

 private:
  void Append(std::string_view text, bool parse_special) {
    if (text.empty()) return;
    if (segments_.empty() || segments_.back().parse_special != parse_special) {
      segments_.push_back({"", parse_special});
    }
    segments_.back().text.append(text);
  }

  std::vector<TextSegment> segments_;
};

struct ChatTemplate::Known {
  std::string_view name;
  Form form;
  std::vector<JinjaToken> pattern;
};

std::span<const ChatTemplate::Known> ChatTemplate::KnownTemplates() {
  static const auto* const known = [] {
    auto* list = new std::vector<Known>;
    const auto add = [&](std::string_view name, Form form, std::string_view source) {
      list->push_back({name, form, ReadJinja(source).value()});
    };
    add("Qwen2.5", Form::kTools, kQwen25Source);
    add("Qwen2", Form::kPlain, kQwen2Source);
    add("ChatML", Form::kPlain, kChatMlSource);
    add("Qwen1.5", Form::kOpenLast, kQwen15Source);
    add("Qwen1.5", Form::kOpenLast, kQwen15BaseSource);
    return list;
  }();
  return *known;
}

absl::StatusOr<ChatTemplate> ChatTemplate::FromJinja(std::string_view source) {
  const auto tokens = ReadJinja(source);
  for (const Known& known : KnownTemplates()) {
    std::vector<std::string> defaults;
    if (!tokens.has_value() || !MatchJinja(known.pattern, kHole, *tokens, &defaults)) continue;
    ChatTemplate result;
    result.form_ = known.form;
    result.name_ = known.name;
    result.has_default_system_ = !defaults.empty();
    if (!defaults.empty()) {
      result.default_system_with_tools_ = defaults.front();
      result.default_system_ = defaults.back();
    }
    return result;
  }
  return InvalidArgument(
      "the model's chat_template is not one that Tandem renders: it must be the template of "
      "Qwen1.5, "
      "Qwen2 or Qwen2.5, with any default system message (it has {} bytes and starts with {})",
      source.size(),
      nlohmann::json(source.substr(0, 60))
          .dump(-1, ' ', true, nlohmann::json::error_handler_t::replace));
}

absl::StatusOr<ChatTemplate> ChatTemplate::FromTokenizerConfig(
    std::string_view tokenizer_config_json) {
  TANDEM_ASSIGN_OR_RETURN(const nlohmann::json config,
                          ParseJson(tokenizer_config_json, "tokenizer_config.json"));
  TANDEM_ASSIGN_OR_RETURN(const auto source, FindSource(config));
  if (!source.has_value()) return ChatTemplate();
  return FromJinja(*source);
}

absl::StatusOr<ChatTemplate> ChatTemplate::Load(const std::string& model_dir) {
  const std::string jinja_path = model_dir + "/chat_template.jinja";
  if (FileExists(jinja_path)) {
    TANDEM_ASSIGN_OR_RETURN(const std::string source, ReadFile(jinja_path, kMaxFileBytes));
    return FromJinja(source);
  }
  const std::string config_path = model_dir + "/tokenizer_config.json";
  if (!FileExists(config_path)) return ChatTemplate();
  TANDEM_ASSIGN_OR_RETURN(const std::string config, ReadFile(config_path, kMaxFileBytes));
  return FromTokenizerConfig(config);
}

absl::StatusOr<std::vector<TextSegment>> ChatTemplate::Render(std::span<const ChatMessage> messages,
                                                              std::span<const std::string> tools,
                                                              bool add_generation_prompt) const {
  if (!has_template()) {
    return FailedPrecondition(
        "this model has no chat template, so it cannot chat; send its prompt as text instead");
  }
  const bool tools_supported = form_ == Form::kTools;
  if (messages.empty()) return InvalidArgument("messages must not be empty");
  if (!tools.empty() && !tools_supported) {
    return InvalidArgument("tools: this model's chat template ({}) has no tools", name_);
  }
  std::vector<std::string> arguments;
  for (size_t i = 0; i < messages.size(); ++i) {
    TANDEM_RETURN_IF_ERROR(CheckMessage(messages[i], i, tools_supported, &arguments));
  }
  std::vector<std::string> printed_tools;
  for (size_t i = 0; i < tools.size(); ++i) {
    TANDEM_ASSIGN_OR_RETURN(std::string json, ObjectToJson(tools[i], fmt::format("tools[{}]", i)));
    printed_tools.push_back(std::move(json));
  }
  SegmentWriter out;
  if (tools_supported) {
    RenderTools(messages, printed_tools, arguments, &out);
  } else {
    RenderPlain(messages, add_generation_prompt, &out);
  }
  // The first Qwen1.5 template lets an assistant message that comes last speak for itself.
  const bool answered = form_ == Form::kOpenLast && messages.back().role == "assistant";
  if (add_generation_prompt && !answered) out.Template("<|im_start|>assistant\n");
  return out.Take();
}

void ChatTemplate::RenderTools(std::span<const ChatMessage> messages,
                               std::span<const std::string> tools,
                               std::span<const std::string> arguments, SegmentWriter* out) const {
  out->Template("<|im_start|>system\n");
  if (messages[0].role == "system") {
    out->Content(messages[0].content);
  } else {
    out->Template(tools.empty() ? default_system_ : default_system_with_tools_);
  }
  if (tools.empty()) {
    out->Template("<|im_end|>\n");
  } else {
    out->Template(kToolsIntro);
    for (const std::string& tool : tools) {
      out->Template("\n");
      out->Content(tool);
    }
    out->Template(kToolsOutro);
  }
  size_t next_arguments = 0;
  for (size_t i = 0; i < messages.size(); ++i) {
    const ChatMessage& message = messages[i];
    if (message.role == "system" && i == 0) continue;
    if (message.role == "tool") {
      if (i == 0 || messages[i - 1].role != "tool") out->Template("<|im_start|>user");
      out->Template("\n<tool_response>\n");
      out->Content(message.content);
      out->Template("\n</tool_response>");
      if (i + 1 == messages.size() || messages[i + 1].role != "tool") out->Template("<|im_end|>\n");
      continue;
    }
    out->Template("<|im_start|>" + message.role);
    if (message.tool_calls.empty() || !message.content.empty()) {
      out->Template("\n");
      out->Content(message.content);
    }
    for (const ChatToolCall& call : message.tool_calls) {
      out->Template("\n<tool_call>\n{\"name\": \"");
      out->Content(call.name);
      out->Template("\", \"arguments\": ");
      out->Content(arguments[next_arguments++]);
      out->Template("}\n</tool_call>");
    }
    out->Template("<|im_end|>\n");
  }
}

void ChatTemplate::RenderPlain(std::span<const ChatMessage> messages, bool add_generation_prompt,
                               SegmentWriter* out) const {
  if (has_default_system_ && messages[0].role != "system") {
    out->Template("<|im_start|>system\n" + default_system_ + "<|im_end|>\n");
  }
  for (size_t i = 0; i < messages.size(); ++i) {
    out->Template("<|im_start|>" + messages[i].role + "\n");
    out->Content(messages[i].content);
    const bool last = i + 1 == messages.size();
    if (form_ == Form::kOpenLast && last && !add_generation_prompt) continue;
    out->Template("<|im_end|>\n");
  }
}

}  // namespace tandem
