// Renders a conversation into the prompt that a Qwen model was trained on (ChatML).
//
// Immutable after construction, thread-safe. This does not run Jinja: it recognises the chat
// templates of Qwen1.5, Qwen2 and Qwen2.5 by their structure, with any default system message, and
// renders them natively. The result equals Hugging Face's apply_chat_template in text; what users
// and tools wrote is kept apart from what the template writes, so that a special token spelled in a
// message stays plain text.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

#include "common/text/tokenizer.h"

namespace tandem {

struct ChatToolCall {
  std::string id;  // not rendered
  std::string name;
  std::string arguments_json;  // a JSON object
};

struct ChatMessage {
  std::string role;  // "system", "user", "assistant" or "tool"
  std::string content;
  std::vector<ChatToolCall> tool_calls;  // assistant only
  std::string tool_call_id;              // not rendered: results follow their calls in order
  std::string name;                      // not rendered
};

class ChatTemplate {
 public:
  // From the content of a tokenizer_config.json. A file without `chat_template` gives a template
  // that cannot render (see has_template). InvalidArgument for malformed JSON and for a template
  // that is none of those known here.
  static absl::StatusOr<ChatTemplate> FromTokenizerConfig(std::string_view tokenizer_config_json);

  // From the Jinja source itself. InvalidArgument if it is none of those known here.
  static absl::StatusOr<ChatTemplate> FromJinja(std::string_view source);

  // From MODEL_DIR/chat_template.jinja, else MODEL_DIR/tokenizer_config.json, else none.
  static absl::StatusOr<ChatTemplate> Load(const std::string& model_dir);

  // A model without a template can generate text but not chat.
  bool has_template() const { return form_ != Form::kNone; }
  // Which template was recognised, for logs: "Qwen2.5", "Qwen2", "Qwen1.5", "ChatML" or "none".
  std::string_view name() const { return name_; }

  // Renders `messages`, with `tools` (each a JSON object) offered to the model. Text from messages
  // and tools comes in segments without parse_special, the template's own text in segments with it.
  // FailedPrecondition if there is no template; InvalidArgument naming `messages[i].field` or
  // `tools[i]`: no messages, unknown role, text that is not UTF-8, JSON that is not an object, tool
  // calls outside assistant messages, tools for a template without them.
  absl::StatusOr<std::vector<TextSegment>> Render(std::span<const ChatMessage> messages,
                                                  std::span<const std::string> tools,
                                                  bool add_generation_prompt) const;

 private:
  enum class Form {
    kNone,
    kTools,     // Qwen2.5: every turn closed, tools and tool calls
    kPlain,     // Qwen2: every turn closed
    kOpenLast,  // Qwen1.5: without a generation prompt the last turn stays open
  };

  struct Known;
  static std::span<const Known> KnownTemplates();

  void RenderTools(std::span<const ChatMessage> messages, std::span<const std::string> tools,
                   std::span<const std::string> arguments, class SegmentWriter* out) const;
  void RenderPlain(std::span<const ChatMessage> messages, bool add_generation_prompt,
                   class SegmentWriter* out) const;

  Form form_ = Form::kNone;
  std::string_view name_ = "none";
  bool has_default_system_ = false;
  std::string default_system_;             // where no system message comes first
  std::string default_system_with_tools_;  // the same, with tools
};

}  // namespace tandem
