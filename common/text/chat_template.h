// Renders a conversation into the prompt that a model was trained on, by the model's own Jinja
// template.
//
// Immutable after construction, thread-safe. The result equals Hugging Face's apply_chat_template
// in text; what users and tools wrote is kept apart from what the template writes, so that a
// special token spelled in a message stays plain text.
#pragma once

#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"

#include "common/text/jinja/template.h"
#include "common/text/tokenizer.h"

namespace tandem {

struct ChatToolCall {
  std::string id;
  std::string name;
  std::string arguments_json;  // a JSON object
};

struct ChatMessage {
  std::string role;  // "system", "user", "assistant" or "tool"
  std::string content;
  std::vector<ChatToolCall> tool_calls;  // assistant only
  std::string tool_call_id;
  std::string name;
};

class ChatTemplate {
 public:
  // "bos_token" -> "<|begin_of_text|>": variables of the template.
  using SpecialTokens = std::map<std::string, std::string>;

  // From the content of a tokenizer_config.json. A file without `chat_template` gives a template
  // that cannot render (see has_template). InvalidArgument for malformed JSON and for a template
  // that is malformed or uses what common/text/jinja does not have.
  static absl::StatusOr<ChatTemplate> FromTokenizerConfig(std::string_view tokenizer_config_json);

  // From the Jinja source itself. InvalidArgument as above.
  static absl::StatusOr<ChatTemplate> FromJinja(std::string_view source,
                                                SpecialTokens special_tokens = {});

  // From MODEL_DIR/chat_template.jinja, else MODEL_DIR/tokenizer_config.json, else none. Special
  // tokens are those of tokenizer_config.json.
  static absl::StatusOr<ChatTemplate> Load(const std::string& model_dir);

  // A model without a template can generate text but not chat.
  bool has_template() const { return template_.has_value(); }
  // Whether the template offers tools to the model.
  bool has_tools() const { return has_template() && template_->Mentions("tools"); }

  // Renders `messages`, with `tools` (each a JSON object) offered to the model. Text from messages
  // and tools comes in segments without parse_special, the template's own text in segments with it.
  // `now` is the date that some templates tell the model. FailedPrecondition if there is no
  // template; InvalidArgument naming `messages[i].field` or `tools[i]`: no messages, unknown role,
  // text that is not UTF-8, JSON that is not an object, tool calls outside assistant messages,
  // tools for a template without them; naming `messages` for a conversation that the template
  // itself refuses.
  absl::StatusOr<std::vector<TextSegment>> Render(std::span<const ChatMessage> messages,
                                                  std::span<const std::string> tools,
                                                  bool add_generation_prompt,
                                                  absl::Time now = absl::Now()) const;

 private:
  std::optional<jinja::Template> template_;
  SpecialTokens special_tokens_;
};

}  // namespace tandem
