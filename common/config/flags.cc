#include "common/config/flags.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <concepts>
#include <cstdlib>
#include <functional>
#include <optional>
#include <sys/ioctl.h>
#include <unistd.h>
#include <utility>

#include "CLI/CLI.hpp"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_split.h"
#include "fmt/ranges.h"
#include "yaml-cpp/yaml.h"

#include "common/base/check.h"
#include "common/base/nearest_name.h"
#include "common/base/status.h"
#include "common/config/bytes.h"
#include "common/config/foreign_flags.h"

namespace tandem {
namespace {

constexpr int kMaxListed = 1 << 16;  // values of one list
constexpr int kWidthElsewhere = 80;  // of help that goes to no terminal
constexpr int kMaxWidth = 120;       // longer lines are hard to read
constexpr char kTokens[] = "tokens";
constexpr char kAnInteger[] = "an integer";
constexpr char kANatural[] = "a non-negative integer";
constexpr char kANumber[] = "a number";

template <typename T>
absl::Status ParseNumber(const std::string& text, const char* accepted, T* out) {
  T value{};
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  if (error == std::errc::result_out_of_range) {
    return InvalidArgument("'{}' is out of range; {} is accepted", text, accepted);
  }
  if (error != std::errc() || stop != end) {
    return InvalidArgument("'{}' is not accepted; give {}", text, accepted);
  }
  *out = value;
  return absl::OkStatus();
}

absl::Status ParseBool(const std::string& text, bool* out) {
  for (const char* yes : {"true", "1", "yes", "on"}) {
    if (text == yes) {
      *out = true;
      return absl::OkStatus();
    }
  }
  for (const char* no : {"false", "0", "no", "off"}) {
    if (text == no) {
      *out = false;
      return absl::OkStatus();
    }
  }
  return InvalidArgument("'{}' is not accepted; give true or false", text);
}

// A whole number of tokens may be written 32k.
template <typename T>
absl::Status ParseValue(const std::string& text, bool tokens, const char* accepted, T* out) {
  if constexpr (std::integral<T>) {
    if (tokens && !text.empty() && absl::ascii_isalpha(text.back())) {
      TANDEM_ASSIGN_OR_RETURN(const int64_t count, ParseCount(text));
      if (!std::in_range<T>(count)) {
        return InvalidArgument("'{}' is out of range; {} is accepted", text, accepted);
      }
      *out = static_cast<T>(count);
      return absl::OkStatus();
    }
  }
  return ParseNumber(text, accepted, out);
}

absl::Status CheckChoice(const std::string& text, const std::vector<std::string>& choices) {
  if (std::find(choices.begin(), choices.end(), text) != choices.end()) return absl::OkStatus();
  const auto nearest = NearestName(text, choices);
  return InvalidArgument("'{}' is not one of {}{}", text, fmt::join(choices, ", "),
                         nearest ? fmt::format("; did you mean {}?", *nearest) : "");
}

absl::Status ParseFinite(const std::string& text, double* out) {
  double value = 0;
  TANDEM_RETURN_IF_ERROR(ParseNumber(text, kANumber, &value));
  if (!std::isfinite(value)) {
    return InvalidArgument("'{}' is not accepted; give a finite number", text);
  }
  *out = value;
  return absl::OkStatus();
}

// Of a flag of another program, which will read the value itself.
absl::Status CheckValue(const FlagInfo& info, const std::string& text) {
  const bool tokens = info.unit == kTokens;
  bool truth{};
  int64_t integer{};
  uint64_t natural{};
  double number{};
  if (info.boolean) return ParseBool(text, &truth);
  if (!info.choices.empty()) return CheckChoice(text, info.choices);
  switch (info.kind) {
    case ValueKind::kText:
      return absl::OkStatus();
    case ValueKind::kInteger:
      return ParseValue(text, tokens, kAnInteger, &integer);
    case ValueKind::kNatural:
      return ParseValue(text, tokens, kANatural, &natural);
    case ValueKind::kNumber:
      return ParseFinite(text, &number);
    case ValueKind::kBytes:
      return ParseBytes(text).status();
  }
  return absl::OkStatus();
}

struct Flag {
  FlagInfo info;
  std::function<absl::Status(const std::string&)> set;
  bool positional = false;
  bool repeated = false;
  bool list = false;
  bool hidden = false;  // in no list and no suggestion
  CLI::Option* option = nullptr;
};

template <typename T>
Flag OptionalFlag(const std::string& name, std::optional<T>* target, const std::string& help,
                  const std::string& unit, ValueKind kind, const char* accepted) {
  return {.info = {.name = name, .unit = unit, .help = help, .kind = kind},
          .set = [target, accepted, tokens = unit == kTokens](const std::string& text) {
            T value{};
            TANDEM_RETURN_IF_ERROR(ParseValue(text, tokens, accepted, &value));
            *target = value;
            return absl::OkStatus();
          }};
}

// "--max-num-seqs" of `tandem up` and of the servers: TANDEM_MAX_NUM_SEQS, so that one environment
// serves both; "--model" of `tandem chat`: TANDEM_CHAT_MODEL.
std::string VariableName(const std::string& program, const std::string& flag) {
  std::string name = "TANDEM_";
  const std::string command = program.substr(std::min(program.find(' '), program.size()));
  if (!command.empty() && command != " up") name += command.substr(1) + "_";
  name += flag.substr(2);
  std::replace(name.begin(), name.end(), '-', '_');
  std::replace(name.begin(), name.end(), ' ', '_');
  return absl::AsciiStrToUpper(name);
}

int HelpWidth() {
  winsize size{};
  if (isatty(STDOUT_FILENO) == 0 || ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) != 0 ||
      size.ws_col == 0) {
    return kWidthElsewhere;
  }
  return std::min<int>(size.ws_col, kMaxWidth);
}

// "max_model_len" and "--max-model-len" name the same flag in YAML.
std::string FlagNameOfKey(std::string key) {
  std::replace(key.begin(), key.end(), '_', '-');
  return key.starts_with("--") ? key : "--" + key;
}

}  // namespace

struct FlagSet::Impl {
  std::string program;
  std::string description;
  std::string group;
  std::vector<std::string> examples;
  std::vector<std::unique_ptr<Flag>> flags;
  std::string config_path;
  std::string version_text;
  std::string wanted_help;  // a group, "all" or ""
  bool help = false;
  bool list = false;
  bool version = false;

  Flag* Find(const std::string& name) const {
    for (const auto& flag : flags) {
      if (!flag->positional && flag->info.name == name) return flag.get();
    }
    return nullptr;
  }
  std::vector<std::string> Names() const {
    std::vector<std::string> names;
    for (const auto& flag : flags) {
      if (!flag->positional && !flag->hidden) names.push_back(flag->info.name);
    }
    return names;
  }
  void AddFlag(Flag flag) {
    if (flag.info.group.empty()) flag.info.group = group;
    if (!flag.positional && flag.info.group != kGeneralGroup) {
      flag.info.environment = VariableName(program, flag.info.name);
    }
    flags.push_back(std::make_unique<Flag>(std::move(flag)));
  }
  void AddGeneral(const std::string& name, bool* target, const std::string& help_text) {
    AddFlag({.info = {.name = name, .group = std::string(kGeneralGroup), .help = help_text},
             .set = [target](const std::string& text) { return ParseBool(text, target); }});
  }
  static bool IsSwitch(const Flag& flag) {  // needs no value
    return flag.info.boolean || (flag.info.group == kGeneralGroup && flag.info.name != "--config");
  }
  bool asked() const { return help || list || version; }

  absl::Status Unknown(const std::string& what, const std::string& name) const {
    if (const auto hint = ForeignFlagHint(name)) {
      return InvalidArgument("unknown {} {}: {}", what, name, *hint);
    }
    const std::vector<std::string> names = Names();
    if (const auto nearest = NearestName(name, names)) {
      return InvalidArgument("unknown {} {}; did you mean {}?", what, name, *nearest);
    }
    return InvalidArgument("unknown {} {}; {} --help lists all flags", what, name, program);
  }
  static absl::Status Apply(const Flag& flag, const std::string& value, const std::string& origin) {
    const absl::Status status = flag.set(value);
    if (status.ok()) return status;
    return InvalidArgument("{}{}: {}", origin, flag.info.name, MessageOf(status));
  }

  absl::Status ParseCommandLine(std::vector<std::string> args, CLI::App* app);
  absl::Status CheckExtras(const std::vector<std::string>& extras) const;
  absl::Status ApplyCommandLine() const;
  absl::Status ApplyYaml(const std::string& path);
  absl::Status ApplyYamlEntry(const std::string& path, const std::string& key,
                              const YAML::Node& value, absl::flat_hash_set<std::string>* seen);
  absl::Status ApplyEnvironment() const;
  absl::Status CheckRequired() const;
};

FlagSet::FlagSet(std::string program, std::string description) : impl_(std::make_unique<Impl>()) {
  impl_->program = std::move(program);
  impl_->description = std::move(description);
  Impl* impl = impl_.get();
  impl->AddFlag({.info = {.name = "--help",
                          .group = std::string(kGeneralGroup),
                          .help = "print this, or the part of a group, and exit"},
                 .set = [impl](const std::string& text) {
                   impl->help = true;
                   if (text != "true") impl->wanted_help = text;
                   return absl::OkStatus();
                 }});
  impl->AddFlag({.info = {.name = "--config",
                          .group = std::string(kGeneralGroup),
                          .unit = "path",
                          .help = "YAML file of flags (keys as here, without dashes in front)"},
                 .set = [impl](const std::string& text) {
                   impl->config_path = text;
                   return absl::OkStatus();
                 }});
  impl->AddGeneral("--list-flags", &impl_->list, "print the flags as JSON and exit");
  impl->flags.back()->hidden = true;
}

FlagSet::~FlagSet() = default;

void FlagSet::Group(const std::string& name) { impl_->group = name; }

void FlagSet::Example(const std::string& command) { impl_->examples.push_back(command); }

void FlagSet::Add(const std::string& name, bool* target, const std::string& help) {
  impl_->AddFlag({.info = {.name = name,
                           .default_text = *target ? "true" : "false",
                           .help = help,
                           .boolean = true},
                  .set = [target](const std::string& text) { return ParseBool(text, target); }});
}

void FlagSet::Add(const std::string& name, int* target, const std::string& help,
                  const std::string& unit) {
  impl_->AddFlag({.info = {.name = name,
                           .unit = unit,
                           .default_text = std::to_string(*target),
                           .help = help,
                           .kind = ValueKind::kInteger},
                  .set = [target, tokens = unit == kTokens](const std::string& text) {
                    return ParseValue(text, tokens, kAnInteger, target);
                  }});
}

void FlagSet::Add(const std::string& name, uint64_t* target, const std::string& help,
                  const std::string& unit) {
  impl_->AddFlag({.info = {.name = name,
                           .unit = unit,
                           .default_text = std::to_string(*target),
                           .help = help,
                           .kind = ValueKind::kNatural},
                  .set = [target, tokens = unit == kTokens](const std::string& text) {
                    return ParseValue(text, tokens, kANatural, target);
                  }});
}

void FlagSet::Add(const std::string& name, double* target, const std::string& help,
                  const std::string& unit) {
  impl_->AddFlag({.info = {.name = name,
                           .unit = unit,
                           .default_text = fmt::format("{}", *target),
                           .help = help,
                           .kind = ValueKind::kNumber},
                  .set = [target](const std::string& text) { return ParseFinite(text, target); }});
}

void FlagSet::Add(const std::string& name, std::string* target, const std::string& help,
                  const std::string& unit) {
  impl_->AddFlag({.info = {.name = name, .unit = unit, .default_text = *target, .help = help},
                  .set = [target](const std::string& text) {
                    *target = text;
                    return absl::OkStatus();
                  }});
}

void FlagSet::Add(const std::string& name, std::optional<int64_t>* target, const std::string& help,
                  const std::string& unit) {
  impl_->AddFlag(OptionalFlag(name, target, help, unit, ValueKind::kInteger, kAnInteger));
}

void FlagSet::Add(const std::string& name, std::optional<uint64_t>* target, const std::string& help,
                  const std::string& unit) {
  impl_->AddFlag(OptionalFlag(name, target, help, unit, ValueKind::kNatural, kANatural));
}

void FlagSet::Add(const std::string& name, std::optional<double>* target, const std::string& help,
                  const std::string& unit) {
  impl_->AddFlag(OptionalFlag(name, target, help, unit, ValueKind::kNumber, kANumber));
}

void FlagSet::AddRepeated(const std::string& name, std::vector<std::string>* target,
                          const std::string& help) {
  impl_->AddFlag({.info = {.name = name, .unit = "may be repeated", .help = help},
                  .set =
                      [target](const std::string& text) {
                        target->push_back(text);
                        return absl::OkStatus();
                      },
                  .repeated = true});
}

void FlagSet::AddList(const std::string& name, std::vector<std::string>* target,
                      const std::string& help, const std::string& unit) {
  AddRepeated(name, target, help);
  impl_->flags.back()->info.unit = unit;
  impl_->flags.back()->list = true;
}

void FlagSet::AddBytes(const std::string& name, int64_t* target, const std::string& help) {
  impl_->AddFlag({.info = {.name = name,
                           .unit = "bytes",
                           .default_text = ExactBytes(*target),
                           .help = help,
                           .kind = ValueKind::kBytes},
                  .set = [target](const std::string& text) -> absl::Status {
                    TANDEM_ASSIGN_OR_RETURN(*target, ParseBytes(text));
                    return absl::OkStatus();
                  }});
}

void FlagSet::AddChoice(const std::string& name, std::string* target,
                        const std::vector<std::string>& choices, const std::string& help) {
  impl_->AddFlag({.info = {.name = name, .default_text = *target, .help = help, .choices = choices},
                  .set = [target, choices](const std::string& text) {
                    TANDEM_RETURN_IF_ERROR(CheckChoice(text, choices));
                    *target = text;
                    return absl::OkStatus();
                  }});
}

void FlagSet::AddPositional(const std::string& name, std::string* target, const std::string& help,
                            bool required) {
  impl_->AddFlag(
      {.info = {.name = name, .default_text = *target, .help = help, .required = required},
       .set =
           [target](const std::string& text) {
             *target = text;
             return absl::OkStatus();
           },
       .positional = true});
}

void FlagSet::AddForeign(const FlagTable& table, std::vector<std::string>* given) {
  for (const FlagInfo& info : table.flags) {
    if (impl_->Find(info.name) != nullptr || info.group == kGeneralGroup) continue;
    impl_->AddFlag({.info = info, .set = [info, given](const std::string& text) {
                      TANDEM_RETURN_IF_ERROR(CheckValue(info, text));
                      given->push_back(fmt::format("{}={}", info.name, text));
                      return absl::OkStatus();
                    }});
    impl_->flags.back()->info.environment = info.environment;
    impl_->flags.back()->info.foreign = true;
  }
}

void FlagSet::Refuse(const std::string& name, const std::string& why) {
  Flag* flag = impl_->Find(name);
  TANDEM_CHECK(flag != nullptr, "{} has no flag {} to refuse", impl_->program, name);
  flag->hidden = true;
  flag->set = [why](const std::string&) { return absl::InvalidArgumentError(why); };
}

void FlagSet::SetEnvironment(const std::string& name, const std::string& variable) {
  Flag* flag = impl_->Find(name);
  TANDEM_CHECK(flag != nullptr, "{} has no flag {}", impl_->program, name);
  flag->info.environment = variable;
}

void FlagSet::AnswerVersion(const std::string& text) {
  impl_->version_text = text;
  impl_->AddGeneral("--version", &impl_->version, "print the version and exit");
}

absl::Status FlagSet::Impl::ParseCommandLine(std::vector<std::string> args, CLI::App* app) {
  app->set_help_flag();
  app->allow_extras();
  for (const auto& flag : flags) {
    const std::string& name = flag->info.name;
    if (name == "--help") {
      flag->option = app->add_flag("-h,--help");
    } else if (flag->info.boolean) {
      flag->option = app->add_flag(name + ",!--no-" + name.substr(2));
    } else if (IsSwitch(*flag)) {
      flag->option = app->add_flag(name);
    } else {
      flag->option = app->add_option(name, [](const CLI::results_t&) { return true; });
      flag->option->expected(1, flag->list ? kMaxListed : 1);
    }
    flag->option->multi_option_policy(flag->repeated ? CLI::MultiOptionPolicy::TakeAll
                                                     : CLI::MultiOptionPolicy::TakeLast);
  }
  // CLI11 takes the next argument as the value of "--name=".
  for (size_t i = 0; i < args.size(); ++i) {
    if (args[i] == "--") break;
    if (!args[i].starts_with("--") || !args[i].ends_with('=')) continue;
    const Flag* flag = Find(args[i].substr(0, args[i].size() - 1));
    if (flag == nullptr || IsSwitch(*flag)) continue;
    args[i].pop_back();
    args.insert(args.begin() + static_cast<std::ptrdiff_t>(++i), "");
  }
  std::reverse(args.begin(), args.end());  // the order that CLI11's vector overload wants
  try {
    app->parse(args);
  } catch (const CLI::ArgumentMismatch& error) {
    const std::string what = error.what();  // "--model: 1 required  missing"
    return InvalidArgument("{}: a value is missing", what.substr(0, what.find(':')));
  } catch (const std::exception& error) {
    return InvalidArgument("{}", error.what());
  }
  return absl::OkStatus();
}

absl::Status FlagSet::Impl::CheckExtras(const std::vector<std::string>& extras) const {
  for (const std::string& extra : extras) {
    if (extra.starts_with("-") && extra.size() > 1) {
      return Unknown("flag", extra.substr(0, extra.find('=')));
    }
  }
  if (!extras.empty()) return InvalidArgument("unexpected argument '{}'", extras.front());
  return absl::OkStatus();
}

absl::Status FlagSet::Impl::ApplyCommandLine() const {
  for (const auto& flag : flags) {
    if (flag->option->count() == 0) continue;
    const std::vector<std::string>& results = flag->option->results();
    for (size_t i = flag->repeated ? 0 : results.size() - 1; i < results.size(); ++i) {
      TANDEM_RETURN_IF_ERROR(Apply(*flag, results[i], ""));
    }
  }
  return absl::OkStatus();
}

absl::Status FlagSet::Impl::ApplyEnvironment() const {
  for (const auto& flag : flags) {
    if (flag->info.environment.empty() || flag->option->count() > 0) continue;
    const char* value = std::getenv(flag->info.environment.c_str());
    if (value == nullptr || *value == '\0') continue;
    const std::string origin = fmt::format("environment {}: ", flag->info.environment);
    if (!flag->list) {
      TANDEM_RETURN_IF_ERROR(Apply(*flag, value, origin));
      continue;
    }
    const std::vector<std::string> items = absl::StrSplit(value, ' ', absl::SkipEmpty());
    for (const std::string& item : items) {
      TANDEM_RETURN_IF_ERROR(Apply(*flag, item, origin));
    }
  }
  return absl::OkStatus();
}

absl::Status FlagSet::Impl::ApplyYamlEntry(const std::string& path, const std::string& key,
                                           const YAML::Node& value,
                                           absl::flat_hash_set<std::string>* seen) {
  const std::string name = FlagNameOfKey(key);
  const std::string origin = fmt::format("{}, line {}: ", path, value.Mark().line + 1);
  if (!seen->insert(name).second) return InvalidArgument("{}key {} stands twice", origin, key);
  if (!value.IsScalar()) {
    return InvalidArgument("{}{} must be one value, not a list or a map", origin, key);
  }
  const Flag* flag = Find(name);
  if (flag == nullptr || flag->info.group == kGeneralGroup) {
    const absl::Status status = Unknown("key", name);
    return InvalidArgument("{}{}", origin, MessageOf(status));
  }
  if (flag->option->count() > 0) return absl::OkStatus();
  const char* variable = std::getenv(flag->info.environment.c_str());
  if (variable != nullptr && *variable != '\0') return absl::OkStatus();
  return Apply(*flag, value.Scalar(), origin);
}

absl::Status FlagSet::Impl::ApplyYaml(const std::string& path) {
  try {
    const YAML::Node root = YAML::LoadFile(path);
    if (root.IsNull()) return absl::OkStatus();
    if (!root.IsMap()) {
      return InvalidArgument("{}: must be a map of flag names to values", path);
    }
    absl::flat_hash_set<std::string> seen;
    for (const auto& entry : root) {
      if (!entry.first.IsScalar()) {
        return InvalidArgument("{}, line {}: a key must be a flag's name", path,
                               entry.first.Mark().line + 1);
      }
      TANDEM_RETURN_IF_ERROR(ApplyYamlEntry(path, entry.first.Scalar(), entry.second, &seen));
    }
  } catch (const YAML::BadFile&) {
    return InvalidArgument("--config: cannot read '{}'", path);
  } catch (const YAML::Exception& error) {
    return InvalidArgument("{}, line {}: {}", path, error.mark.line + 1, error.msg);
  }
  return absl::OkStatus();
}

absl::Status FlagSet::Impl::CheckRequired() const {
  for (const auto& flag : flags) {
    if (flag->info.required && flag->option->count() == 0) {
      return InvalidArgument("{} is missing: {}", flag->info.name, flag->info.help);
    }
  }
  return absl::OkStatus();
}

absl::Status FlagSet::Parse(const std::vector<std::string>& args) {
  CLI::App app(impl_->description, impl_->program);
  absl::Status status = impl_->ParseCommandLine(args, &app);
  if (status.ok()) status = impl_->CheckExtras(app.remaining());
  if (status.ok()) status = impl_->ApplyCommandLine();
  // Who asks for help need not have the rest right.
  if (status.ok() && !impl_->asked()) {
    status = impl_->ApplyEnvironment();
    if (status.ok() && !impl_->config_path.empty()) status = impl_->ApplyYaml(impl_->config_path);
    if (status.ok()) status = impl_->CheckRequired();
  }
  for (const auto& flag : impl_->flags) flag->option = nullptr;  // belongs to `app`
  return status;
}

absl::Status FlagSet::Parse(int argc, const char* const* argv) {
  return Parse(std::vector<std::string>(argv + std::min(argc, 1), argv + argc));
}

const std::string& FlagSet::program() const { return impl_->program; }

bool FlagSet::HelpRequested() const { return impl_->asked(); }

std::vector<std::string> FlagSet::Names() const { return impl_->Names(); }

FlagTable FlagSet::Table() const {
  FlagTable table{
      .program = impl_->program, .description = impl_->description, .examples = impl_->examples};
  for (const auto& flag : impl_->flags) {
    if (flag->hidden) continue;
    (flag->positional ? table.positionals : table.flags).push_back(flag->info);
  }
  return table;
}

std::string FlagSet::Help() const {
  if (impl_->list) return TableJson(Table());
  if (impl_->version) return impl_->version_text;
  return HelpText(Table(), impl_->wanted_help, HelpWidth());
}

}  // namespace tandem
