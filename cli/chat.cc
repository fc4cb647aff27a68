// `tandem chat`: a conversation in the terminal or from a pipe, or one question.
#include <algorithm>
#include <iostream>
#include <optional>
#include <string>
#include <string_view>
#include <unistd.h>

#include "fmt/format.h"

#include "cli/cancel_on_interrupt.h"
#include "cli/chat_history.h"
#include "cli/command.h"
#include "cli/inference_client.h"
#include "cli/line_editor.h"
#include "cli/reading_line.h"
#include "cli/sampling_flags.h"
#include "cli/server_flags.h"
#include "cli/terminal.h"
#include "cli/units.h"
#include "common/base/status.h"
#include "common/rpc/status.h"
#include "common/text/utf8.h"

namespace tandem::cli {
namespace {

struct ChatFlags {
  std::string question;
  ServerFlags server_flags;
  PublicServer server;
  std::string model;
  std::string system;
  std::string cache_salt;
  double timeout_s = 0;
  bool json = false;
  bool stats = false;
  bool echo = false;
  bool table = false;
  bool history = true;
  SamplingFlags sampling;
};

constexpr char kUserPrompt[] = "you> ";
constexpr char kMorePrompt[] = "...> ";
constexpr char kAnswerPrompt[] = "tandem> ";

constexpr char kHelp[] = R"(/reset  forget the conversation
/stats  show what the turns cost
/quit   leave, as Ctrl-D
Enter sends. Alt-Enter begins another line, and """ opens and closes a text of
several. Ctrl-C stops an answer, clears a line, and leaves at an empty one.
)";

// One conversation: its messages so far and what the turns cost.
class Conversation {
 public:
  // `prompts`: whether answers are shown behind kAnswerPrompt.
  Conversation(const ChatFlags& flags, InferenceClient* client, bool prompts)
      : flags_(flags), client_(client), prompts_(prompts || flags.echo) {
    request_.set_model(flags.model);
    *request_.mutable_sampling() = flags.sampling.ToProto();
    request_.mutable_options()->set_cache_salt(flags.cache_salt);
    Reset();
  }

  void Reset() {
    request_.clear_messages();
    if (!flags_.system.empty()) Append("system", flags_.system);
  }

  // Sends one message of the user. Not OK: it is taken back, as if never said; where the answer was
  // cancelled half-way it stays, with what there is of it.
  absl::Status Say(const std::string& message) {
    if (const auto offset = FindInvalidUtf8(message)) {
      return absl::InvalidArgumentError(fmt::format("not valid UTF-8 at byte {}", *offset));
    }
    Append("user", message);
    if (flags_.echo && !flags_.json) fmt::print("{}{}\n", kUserPrompt, message);
    if (prompts_ && !flags_.json) fmt::print("{}", kAnswerPrompt);
    std::fflush(stdout);
    const absl::Duration timeout =
        flags_.timeout_s > 0 ? absl::Seconds(flags_.timeout_s) : absl::InfiniteDuration();
    ReadingLine reading(ReadingLine::Of(stdout, prompts_ ? kAnswerPrompt : ""), Clock::Real());
    request_.mutable_options()->set_progress(reading.wanted() && !flags_.json);
    Answer answer = client_->Chat(
        request_, timeout,
        [&](const std::string& text) {
          reading.Clear();
          if (flags_.json) return;
          fmt::print("{}", text);
          std::fflush(stdout);
        },
        [&](const v1::PromptProgress& progress) { reading.Show(progress); });
    reading.Clear();
    const bool shown = prompts_ || !answer.whole.text().empty() || answer.ok();
    if (!flags_.json && shown) fmt::print("\n");
    std::fflush(stdout);
    const bool cancelled = absl::IsCancelled(answer.status);
    if (!answer.ok() && (!cancelled || answer.whole.text().empty())) {
      request_.mutable_messages()->RemoveLast();
      return answer.status;
    }
    Append("assistant", answer.whole.text());
    Report(message, answer);
    answers_.push_back(std::move(answer));
    return absl::OkStatus();
  }

  // How many of the oldest turns must go so that `message` fits, and leaves an eighth of the
  // longest sequence (or --max-tokens) for its answer; 0 where it is not the conversation that is
  // too long. `max_model_len` is set with it.
  int TurnsTooMany(const std::string& message, uint32_t* max_model_len) const {
    v1::ChatRequest request = request_;
    v1::ChatMessage* const last = request.add_messages();
    last->set_role("user");
    last->set_content(message);
    for (int dropped = 0; dropped == 0 || DropOldest(1, &request); ++dropped) {
      const auto tokens = client_->Tokenize(request);
      if (!tokens.ok() && !absl::IsInvalidArgument(tokens.status())) return 0;
      if (!tokens.ok()) continue;
      *max_model_len = tokens->max_model_len();
      const uint32_t answer =
          flags_.sampling.max_tokens
              ? request.sampling().max_tokens()
              : std::max(1u, *max_model_len / (dropped > 0 ? 8 : *max_model_len));
      if (static_cast<uint64_t>(tokens->ids_size()) + answer <= *max_model_len) return dropped;
    }
    return 0;
  }
  void DropOldest(int turns) { DropOldest(turns, &request_); }

  void PrintStats() const {
    for (const Answer& answer : answers_) PrintCost(answer);
  }
  void PrintTable() const { fmt::print("\n{}", RenderTurnTable(answers_)); }

 private:
  static void PrintCost(const Answer& answer) {
    fmt::print("{}\n", WrappedFor(STDOUT_FILENO, DescribeCost(answer)));
  }
  void Append(const std::string& role, const std::string& content) {
    v1::ChatMessage* message = request_.add_messages();
    message->set_role(role);
    message->set_content(content);
  }
  // False where there are not so many whole turns.
  bool DropOldest(int turns, v1::ChatRequest* request) const {
    const int first = flags_.system.empty() ? 0 : 1;
    if (first + 2 * turns > request->messages_size()) return false;
    request->mutable_messages()->DeleteSubrange(first, 2 * turns);
    return true;
  }
  void Report(const std::string& message, const Answer& answer) const {
    if (flags_.json) {
      nlohmann::ordered_json out = {{"turn", answers_.size() + 1}, {"user", message}};
      out.update(AnswerJson(answer));
      fmt::print("{}\n", JsonLine(out));
    } else if (flags_.stats) {
      PrintCost(answer);
    }
    std::fflush(stdout);
  }

  const ChatFlags& flags_;
  InferenceClient* const client_;
  const bool prompts_;
  v1::ChatRequest request_;
  std::vector<Answer> answers_;
};

bool IsBlank(const std::string& text) { return text.find_first_not_of(" \t\n") == text.npos; }

// Reads lines until the input ends. The first error ends it too: what follows would rest on an
// answer that never came.
int ConverseByLines(const ChatFlags& flags, InferenceClient* client, CancelOnInterrupt* cancel) {
  Conversation conversation(flags, client, /*prompts=*/false);
  std::string line;
  int exit_code = kExitOk;
  while (exit_code == kExitOk && std::getline(std::cin, line) && line != "/quit" &&
         line != "/exit") {
    if (line.ends_with('\r')) line.pop_back();
    if (IsBlank(line)) continue;
    if (line == "/reset") {
      conversation.Reset();
    } else if (line == "/stats") {
      conversation.PrintStats();
    } else if (line == "/help") {
      fmt::print("{}", kHelp);
    } else {
      const absl::Status status = conversation.Say(line);
      if (cancel->TakeCancelled()) return kExitInterrupted;
      if (!status.ok()) exit_code = Fail("chat", status, flags.server);
    }
  }
  if (flags.table) conversation.PrintTable();
  return exit_code;
}

int AskOnce(const ChatFlags& flags, InferenceClient* client, CancelOnInterrupt* cancel) {
  Conversation conversation(flags, client, /*prompts=*/false);
  const absl::Status status = conversation.Say(flags.question);
  if (cancel->TakeCancelled()) return kExitInterrupted;
  if (!status.ok()) return Fail("chat", status, flags.server);
  if (flags.table) conversation.PrintTable();
  return kExitOk;
}

// A conversation at a terminal.
class TerminalChat {
 public:
  TerminalChat(const ChatFlags& flags, InferenceClient* client, LineEditor* editor)
      : flags_(flags),
        editor_(editor),
        conversation_(flags, client, /*prompts=*/true),
        history_(flags.history ? ChatHistory::DefaultPath() : "") {}

  void Run(const v1::Model& model) {
    for (const std::string& message : history_.Load()) editor_->AddHistory(message);
    fmt::print("{} at {}, {} tokens at most. /help for help, Ctrl-D to leave.\n", model.id(),
               flags_.server.address, CountText(model.max_model_len()));
    while (const auto message = ReadMessage()) {
      if (IsBlank(*message)) continue;
      editor_->AddHistory(*message);
      history_.Append(*message);
      if (IsCommand(*message)) {
        if (!Obey(*message)) break;
      } else {
        Say(*message);
      }
    }
    if (flags_.table) conversation_.PrintTable();
  }

 private:
  // A slash and one word of small letters; a path is none.
  static bool IsCommand(const std::string& message) {
    return message.size() > 1 && message.front() == '/' &&
           std::all_of(message.begin() + 1, message.end(),
                       [](char c) { return c >= 'a' && c <= 'z'; });
  }

  // False: leave.
  bool Obey(const std::string& command) {
    if (command == "/quit" || command == "/exit") return false;
    if (command == "/reset") {
      conversation_.Reset();
    } else if (command == "/stats") {
      conversation_.PrintStats();
    } else if (command == "/help") {
      fmt::print("{}", kHelp);
    } else {
      fmt::print("unknown command {}; /help lists them\n", command);
    }
    return true;
  }

  // nullopt: the user leaves.
  std::optional<std::string> ReadMessage() {
    LineEditor::Line line = editor_->Read(kUserPrompt);
    if (line.outcome == LineEditor::Outcome::kInterrupted) {
      if (line.text.empty()) return std::nullopt;
      return "";
    }
    if (line.outcome == LineEditor::Outcome::kEndOfInput) {
      fmt::print("\n");
      return std::nullopt;
    }
    if (!line.text.starts_with(kQuotes)) return line.text;
    std::string text = line.text.substr(kQuotes.size());
    while (!text.ends_with(kQuotes)) {
      line = editor_->Read(kMorePrompt);
      if (line.outcome != LineEditor::Outcome::kLine) return "";
      text += "\n" + line.text;
    }
    text.resize(text.size() - kQuotes.size());
    return text;
  }

  void Say(const std::string& message) {
    absl::Status status = conversation_.Say(message);
    if (absl::IsInvalidArgument(status) && MakeRoom(message)) status = conversation_.Say(message);
    if (!status.ok() && !absl::IsCancelled(status)) Fail("chat", status, flags_.server);
  }

  // Where the conversation has become too long for `message`, asks whether its beginning may go.
  bool MakeRoom(const std::string& message) {
    uint32_t max_model_len = 0;
    const int turns = conversation_.TurnsTooMany(message, &max_model_len);
    if (turns == 0) return false;
    fmt::print("The conversation no longer fits into {} tokens.\n", max_model_len);
    const std::string question =
        fmt::format("Forget the oldest {}? [Y/n] ",
                    turns == 1 ? "question and its answer" : fmt::format("{} turns", turns));
    const LineEditor::Line line = editor_->Read(question);
    const bool yes =
        line.outcome == LineEditor::Outcome::kLine &&
        (line.text.empty() || line.text == "y" || line.text == "Y" || line.text == "yes");
    if (yes) conversation_.DropOldest(turns);
    return yes;
  }

  static constexpr std::string_view kQuotes = "\"\"\"";

  const ChatFlags& flags_;
  LineEditor* const editor_;
  Conversation conversation_;
  const ChatHistory history_;
};

int ConverseAtTerminal(const ChatFlags& flags, SignalWaiter* signals, InferenceClient* client) {
  LineEditor editor;
  CancelOnInterrupt cancel(signals, client, &editor);
  const absl::StatusOr<v1::Model> model = client->GetModel();
  if (!model.ok()) {
    if (cancel.TakeCancelled()) return kExitInterrupted;
    return Fail("chat", model.status(), flags.server);
  }
  TerminalChat(flags, client, &editor).Run(*model);
  return kExitOk;
}

}  // namespace

int RunChat(const Arguments& arguments) {
  FlagSet parser("tandem chat",
                 "A conversation, in the terminal or from a pipe, where one line is one turn; or "
                 "the answer to one question.");
  ChatFlags flags;
  parser.AddPositional("QUESTION", &flags.question, "ask this alone, print the answer, end",
                       /*required=*/false);
  flags.server_flags.AddTo(&parser);
  parser.Add("--model", &flags.model, "served name; default: the cluster's model");
  parser.Add("--system", &flags.system, "system message; default: the model's own");
  parser.Add("--cache-salt", &flags.cache_salt, "share cached prefixes only within this salt");
  parser.Add("--timeout", &flags.timeout_s, "time one answer may take; 0: no limit", "s");
  parser.Add("--json", &flags.json, "one JSON object per finished turn instead of text");
  parser.Add("--stats", &flags.stats, "one line about tokens and time after each turn");
  parser.Add("--echo", &flags.echo, "show the lines read, for input from a pipe");
  parser.Add("--table", &flags.table, "a table of all turns at the end");
  parser.Add("--history", &flags.history, "keep what is typed for the arrow keys of the next chat");
  flags.sampling.AddTo(&parser);
  parser.Example("tandem chat");
  parser.Example("tandem chat \"What is 17 + 25?\"");
  if (const auto exit_code = ParseOrExit(&parser, arguments, flags.server_flags, &flags.server))
    return *exit_code;
  if (FindInvalidUtf8(flags.system)) {
    fmt::print(stderr, "tandem chat: --system: not valid UTF-8\n");
    return kExitUsage;
  }
  SignalWaiter signals;
  InferenceClient client(flags.server);
  const bool terminal = isatty(STDIN_FILENO) == 1 && isatty(STDOUT_FILENO) == 1;
  if (flags.question.empty() && terminal && !flags.json) {
    return ConverseAtTerminal(flags, &signals, &client);
  }
  CancelOnInterrupt cancel(&signals, &client);
  if (!flags.question.empty()) return AskOnce(flags, &client, &cancel);
  return ConverseByLines(flags, &client, &cancel);
}

}  // namespace tandem::cli
