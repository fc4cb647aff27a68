// `tandem chat`: a conversation in the terminal, or from a pipe.
#include <iostream>
#include <unistd.h>

#include "fmt/format.h"

#include "cli/cancel_on_interrupt.h"
#include "cli/command.h"
#include "cli/inference_client.h"
#include "cli/sampling_flags.h"
#include "common/text/utf8.h"

namespace tandem::cli {
namespace {

struct ChatFlags {
  std::string server;
  std::string model;
  std::string system;
  std::string cache_salt;
  double timeout_s = 0;
  bool json = false;
  bool stats = false;
  bool echo = false;
  bool table = false;
  SamplingFlags sampling;
};

// One conversation: its messages so far and what the turns cost.
class Conversation {
 public:
  Conversation(const ChatFlags& flags, InferenceClient* client, bool interactive)
      : flags_(flags), client_(client), interactive_(interactive) {
    request_.set_model(flags.model);
    *request_.mutable_sampling() = flags.sampling.ToProto();
    request_.mutable_options()->set_cache_salt(flags.cache_salt);
    Reset();
  }

  void Reset() {
    request_.clear_messages();
    if (!flags_.system.empty()) Append("system", flags_.system);
  }

  // Sends one line of the user. Not OK: the line is taken back, as if never said; where the answer
  // was cancelled half-way it stays, with what there is of it.
  absl::Status Say(const std::string& line) {
    if (const auto offset = FindInvalidUtf8(line)) {
      return absl::InvalidArgumentError(fmt::format("not valid UTF-8 at byte {}", *offset));
    }
    Append("user", line);
    if (flags_.echo && !flags_.json) fmt::print("{}{}\n", kUserPrompt, line);
    if ((flags_.echo || interactive_) && !flags_.json) fmt::print("{}", kAnswerPrompt);
    std::fflush(stdout);
    const absl::Duration timeout =
        flags_.timeout_s > 0 ? absl::Seconds(flags_.timeout_s) : absl::InfiniteDuration();
    Answer answer = client_->Chat(request_, timeout, [this](const std::string& text) {
      if (flags_.json) return;
      fmt::print("{}", text);
      std::fflush(stdout);
    });
    if (!flags_.json) fmt::print("\n");
    const bool cancelled = absl::IsCancelled(answer.status);
    if (!answer.ok() && (!cancelled || answer.whole.text().empty())) {
      request_.mutable_messages()->RemoveLast();
      return answer.status;
    }
    Append("assistant", answer.whole.text());
    Report(line, answer);
    answers_.push_back(std::move(answer));
    return absl::OkStatus();
  }

  void PrintStats() const {
    for (const Answer& answer : answers_) fmt::print("{}\n", DescribeCost(answer));
  }
  void PrintTable() const { fmt::print("\n{}", RenderTurnTable(answers_)); }

  static constexpr char kUserPrompt[] = "you> ";
  static constexpr char kAnswerPrompt[] = "tandem> ";

 private:
  void Append(const std::string& role, const std::string& content) {
    v1::ChatMessage* message = request_.add_messages();
    message->set_role(role);
    message->set_content(content);
  }
  void Report(const std::string& line, const Answer& answer) const {
    if (flags_.json) {
      nlohmann::ordered_json out = {{"turn", answers_.size() + 1}, {"user", line}};
      out.update(AnswerJson(answer));
      fmt::print("{}\n", JsonLine(out));
    } else if (flags_.stats) {
      fmt::print("{}\n", DescribeCost(answer));
    }
    std::fflush(stdout);
  }

  const ChatFlags& flags_;
  InferenceClient* const client_;
  const bool interactive_;
  v1::ChatRequest request_;
  std::vector<Answer> answers_;
};

constexpr char kHelp[] =
    "/reset forgets the conversation, /stats shows what the turns cost, /quit ends";

// Reads lines until the input or the user ends it. From a pipe the first error ends it too: what
// follows would rest on an answer that never came.
int Converse(const ChatFlags& flags, InferenceClient* client, bool interactive) {
  Conversation conversation(flags, client, interactive);
  std::string line;
  int exit_code = kExitOk;
  if (interactive) fmt::print("{}; Ctrl-C stops an answer.\n", kHelp);
  while (true) {
    if (interactive) fmt::print("{}", Conversation::kUserPrompt);
    std::fflush(stdout);
    if (!std::getline(std::cin, line) || line == "/quit" || line == "/exit") break;
    if (line.ends_with('\r')) line.pop_back();
    if (line.find_first_not_of(" \t") == std::string::npos) continue;
    if (line == "/reset") {
      conversation.Reset();
    } else if (line == "/stats") {
      conversation.PrintStats();
    } else if (line == "/help") {
      fmt::print("{}\n", kHelp);
    } else if (const absl::Status status = conversation.Say(line); !status.ok()) {
      if (interactive && absl::IsCancelled(status)) continue;
      exit_code = Fail("chat", status, flags.server);
      if (!interactive) break;
      exit_code = kExitOk;
    }
  }
  if (interactive && std::cin.eof()) fmt::print("\n");
  if (flags.table) conversation.PrintTable();
  return exit_code;
}

}  // namespace

int RunChat(const Arguments& arguments) {
  FlagSet parser("tandem chat",
                 "A conversation: one line, one turn. Reads a terminal or a pipe; in the terminal "
                 "/reset, /stats, /quit.");
  ChatFlags flags;
  AddServerFlag(&parser, &flags.server);
  parser.Add("--model", &flags.model, "served name; default: the cluster's model");
  parser.Add("--system", &flags.system, "system message; default: the model's own");
  parser.Add("--cache-salt", &flags.cache_salt, "share cached prefixes only within this salt");
  parser.Add("--timeout", &flags.timeout_s, "time one answer may take; 0: no limit", "s");
  parser.Add("--json", &flags.json, "one JSON object per finished turn instead of text");
  parser.Add("--stats", &flags.stats, "one line about tokens and time after each turn");
  parser.Add("--echo", &flags.echo, "show the lines read, for input from a pipe");
  parser.Add("--table", &flags.table, "a table of all turns at the end");
  flags.sampling.AddTo(&parser);
  if (const auto exit_code = ParseOrExit(&parser, arguments)) return *exit_code;
  if (FindInvalidUtf8(flags.system)) {
    fmt::print(stderr, "tandem chat: --system: not valid UTF-8\n");
    return kExitUsage;
  }
  SignalWaiter signals;
  InferenceClient client(flags.server);
  CancelOnInterrupt cancel(&signals, &client);
  return Converse(flags, &client, isatty(STDIN_FILENO) == 1 && !flags.json);
}

}  // namespace tandem::cli
