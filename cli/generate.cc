// `tandem generate`: continues one prompt.
#include <algorithm>
#include <charconv>
#include <iostream>
#include <iterator>
#include <unistd.h>

#include "fmt/format.h"

#include "cli/cancel_on_interrupt.h"
#include "cli/command.h"
#include "cli/inference_client.h"
#include "cli/reading_line.h"
#include "cli/sampling_flags.h"
#include "cli/server_flags.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/text/utf8.h"

namespace tandem::cli {
namespace {

struct GenerateFlags {
  ServerFlags server_flags;
  PublicServer server;
  std::string model;
  std::optional<std::string> prompt;
  std::string prompt_file;
  std::string token_ids;
  std::string cache_salt;
  std::string request_id;
  double timeout_s = 0;
  bool json = false;
  bool stats = false;
  SamplingFlags sampling;
};

// "1,2,3" or "[1, 2, 3]".
absl::Status ParseTokenIds(std::string text, v1::TokenIds* out) {
  if (text.starts_with('[') && text.ends_with(']')) text = text.substr(1, text.size() - 2);
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    size_t first = begin;
    while (first < end && text[first] == ' ') ++first;
    size_t last = end;
    while (last > first && text[last - 1] == ' ') --last;
    uint32_t id = 0;
    const auto [stop, error] = std::from_chars(text.data() + first, text.data() + last, id);
    if (error != std::errc() || stop != text.data() + last) {
      return InvalidArgument("--token-ids: '{}' at position {} is not a token id; give e.g. 1,2,3",
                             text.substr(first, last - first), out->ids_size());
    }
    out->add_ids(id);
    begin = end + 1;
  }
  return absl::OkStatus();
}

std::string ReadStdin() { return std::string(std::istreambuf_iterator<char>(std::cin), {}); }

// The text of whichever flag gave it; of stdin, where none did and it is not a terminal.
absl::StatusOr<std::string> PromptText(const GenerateFlags& flags) {
  if (flags.prompt.has_value()) return *flags.prompt;
  if (!flags.prompt_file.empty() && flags.prompt_file != "-") return ReadFile(flags.prompt_file);
  std::string text = ReadStdin();
  if (text.empty()) return InvalidArgument("the prompt from stdin is empty");
  return text;
}

absl::StatusOr<v1::GenerateRequest> MakeRequest(const GenerateFlags& flags) {
  const int sources = int{flags.prompt.has_value()} + int{!flags.prompt_file.empty()} +
                      int{!flags.token_ids.empty()};
  if (sources > 1 || (sources == 0 && isatty(STDIN_FILENO) == 1)) {
    return InvalidArgument(
        "give one prompt: TEXT, --prompt TEXT, --prompt-file FILE, --token-ids 1,2,3 or stdin");
  }
  v1::GenerateRequest request;
  request.set_model(flags.model);
  *request.mutable_sampling() = flags.sampling.ToProto();
  request.mutable_options()->set_cache_salt(flags.cache_salt);
  request.mutable_options()->set_request_id(flags.request_id);
  if (!flags.token_ids.empty()) {
    TANDEM_RETURN_IF_ERROR(ParseTokenIds(flags.token_ids, request.mutable_token_ids()));
    return request;
  }
  TANDEM_ASSIGN_OR_RETURN(std::string text, PromptText(flags));
  if (const auto offset = FindInvalidUtf8(text)) {
    return InvalidArgument("the prompt is not valid UTF-8 at byte {}", *offset);
  }
  request.set_text(std::move(text));
  return request;
}

// What came, where the model has no tokenizer and so no text.
std::string TokenIdsText(const v1::GenerateResponse& whole) {
  return fmt::format("{}", fmt::join(whole.token_ids(), ","));
}

}  // namespace

int RunGenerate(const Arguments& arguments) {
  FlagSet parser("tandem generate",
                 "Continues one prompt, from an argument, a file or stdin, and streams the text.");
  GenerateFlags flags;
  flags.server_flags.AddTo(&parser);
  std::vector<std::string> prompt;
  std::string argument;
  parser.AddPositional("TEXT", &argument, "the prompt", /*required=*/false);
  parser.Add("--model", &flags.model, "served name; default: the cluster's model");
  parser.AddRepeated("--prompt", &prompt, "the prompt; the last one counts");
  parser.Add("--prompt-file", &flags.prompt_file, "file that holds the prompt; -: stdin", "path");
  parser.Add("--token-ids", &flags.token_ids, "the prompt as token ids: 1,2,3");
  parser.Add("--cache-salt", &flags.cache_salt, "share cached prefixes only within this salt");
  parser.Add("--request-id", &flags.request_id, "default: drawn by the router");
  parser.Add("--timeout", &flags.timeout_s, "time the answer may take; 0: no limit", "s");
  parser.Add("--json", &flags.json, "one JSON object at the end instead of text");
  parser.Add("--stats", &flags.stats, "one line about tokens and time on stderr");
  flags.sampling.AddTo(&parser);
  parser.Example("tandem generate \"Once upon a time\" --max-tokens 50");
  parser.Example("tandem generate <prompt.txt");
  if (const auto exit_code = ParseOrExit(&parser, arguments, flags.server_flags, &flags.server))
    return *exit_code;
  if (!argument.empty() && !prompt.empty()) {
    fmt::print(stderr, "tandem generate: the prompt is given twice, as argument and by --prompt\n");
    return kExitUsage;
  }
  if (!argument.empty()) flags.prompt = argument;
  if (!prompt.empty()) flags.prompt = prompt.back();

  absl::StatusOr<v1::GenerateRequest> request = MakeRequest(flags);
  if (!request.ok()) {
    fmt::print(stderr, "tandem generate: {}\n", MessageOf(request.status()));
    return kExitUsage;
  }
  SignalWaiter signals;
  InferenceClient client(flags.server);
  CancelOnInterrupt cancel(&signals, &client);
  const absl::Duration timeout =
      flags.timeout_s > 0 ? absl::Seconds(flags.timeout_s) : absl::InfiniteDuration();
  ReadingLine reading(ReadingLine::Of(stderr, ""), Clock::Real());
  request->mutable_options()->set_progress(reading.wanted());
  const Answer answer = client.Generate(
      *request, timeout,
      [&](const std::string& text) {
        reading.Clear();
        if (flags.json) return;
        fmt::print("{}", text);
        std::fflush(stdout);
      },
      [&](const v1::PromptProgress& progress) { reading.Show(progress); });
  reading.Clear();
  const v1::GenerateResponse& whole = answer.whole;
  const bool only_ids = request->has_token_ids() && whole.text().empty();
  if (!flags.json && only_ids) fmt::print("{}", TokenIdsText(whole));
  if (!flags.json && !(whole.text().empty() && whole.token_ids().empty())) fmt::print("\n");
  std::fflush(stdout);  // before what stderr says of it
  if (absl::IsCancelled(answer.status) && cancel.TakeCancelled()) return kExitInterrupted;
  if (!answer.ok()) return Fail("generate", answer.status, flags.server);
  if (flags.json) fmt::print("{}\n", JsonLine(AnswerJson(answer)));
  if (flags.stats) Complain(DescribeCost(answer));
  return kExitOk;
}

}  // namespace tandem::cli
