#include "common/config/flags.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <functional>
#include <optional>
#include <utility>

#include "CLI/CLI.hpp"
#include "absl/container/flat_hash_set.h"
#include "fmt/ranges.h"
#include "nlohmann/json.hpp"
#include "yaml-cpp/yaml.h"

#include "common/base/nearest_name.h"
#include "common/base/status.h"
#include "common/config/bytes.h"

namespace tandem {
namespace {

constexpr size_t kHelpColumn = 36;
constexpr int kMaxListed = 1 << 16;  // values of one list

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

struct Flag {
  std::string name;  // with its dashes; a positional has none
  std::string help;
  std::string unit;
  std::string default_text;
  bool is_bool = false;
  bool positional = false;
  bool repeated = false;
  bool list = false;
  bool required = false;
  bool hidden = false;  // in no list and no suggestion
  std::function<absl::Status(const std::string&)> set;
  CLI::Option* option = nullptr;
};

template <typename T>
Flag OptionalFlag(const std::string& name, std::optional<T>* target, const std::string& help,
                  const std::string& unit, const char* accepted) {
  return {
      .name = name, .help = help, .unit = unit, .set = [target, accepted](const std::string& text) {
        T value{};
        TANDEM_RETURN_IF_ERROR(ParseNumber(text, accepted, &value));
        *target = value;
        return absl::OkStatus();
      }};
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
  std::vector<std::unique_ptr<Flag>> flags;
  std::vector<std::string>* unknown = nullptr;
  std::string config_path;
  bool help = false;
  bool list = false;

  Flag* Find(const std::string& name) const {
    for (const auto& flag : flags) {
      if (!flag->positional && flag->name == name) return flag.get();
    }
    return nullptr;
  }
  std::vector<std::string> Names() const {
    std::vector<std::string> names;
    for (const auto& flag : flags) {
      if (!flag->positional && !flag->hidden) names.push_back(flag->name);
    }
    return names;
  }
  std::string HelpText() const;
  std::string ListText() const;
  void AddFlag(Flag flag) { flags.push_back(std::make_unique<Flag>(std::move(flag))); }

  absl::Status Unknown(const std::string& what, const std::string& name) const {
    const std::vector<std::string> names = Names();
    if (const auto nearest = NearestName(name, names)) {
      return InvalidArgument("unknown {} {}; did you mean {}?", what, name, *nearest);
    }
    return InvalidArgument("unknown {} {}; {} --help lists all flags", what, name, program);
  }
  absl::Status Apply(const Flag& flag, const std::string& value, const std::string& origin) const {
    const absl::Status status = flag.set(value);
    if (status.ok()) return status;
    return InvalidArgument("{}{}: {}", origin, flag.name, MessageOf(status));
  }

  absl::Status ParseCommandLine(std::vector<std::string> args, CLI::App* app);
  absl::Status CheckExtras(const std::vector<std::string>& extras);
  absl::Status ApplyYaml(const std::string& path);
  absl::Status ApplyYamlEntry(const std::string& path, const std::string& key,
                              const YAML::Node& value, absl::flat_hash_set<std::string>* seen);
};

FlagSet::FlagSet(std::string program, std::string description) : impl_(std::make_unique<Impl>()) {
  impl_->program = std::move(program);
  impl_->description = std::move(description);
  Add("--help", &impl_->help, "print this and exit");
  Add("--config", &impl_->config_path,
      "YAML file of flags (keys as here, without dashes in front); flags win", "path");
  Add("--list-flags", &impl_->list, "print the flags as JSON and exit");
  impl_->flags.back()->hidden = true;
}

FlagSet::~FlagSet() = default;

void FlagSet::Add(const std::string& name, bool* target, const std::string& help) {
  impl_->AddFlag({.name = name,
                  .help = help,
                  .default_text = *target ? "true" : "false",
                  .is_bool = true,
                  .set = [target](const std::string& text) { return ParseBool(text, target); }});
}

void FlagSet::Add(const std::string& name, int* target, const std::string& help,
                  const std::string& unit) {
  impl_->AddFlag({.name = name,
                  .help = help,
                  .unit = unit,
                  .default_text = std::to_string(*target),
                  .set = [target](const std::string& text) {
                    return ParseNumber(text, "an integer", target);
                  }});
}

void FlagSet::Add(const std::string& name, uint64_t* target, const std::string& help,
                  const std::string& unit) {
  impl_->AddFlag({.name = name,
                  .help = help,
                  .unit = unit,
                  .default_text = std::to_string(*target),
                  .set = [target](const std::string& text) {
                    return ParseNumber(text, "a non-negative integer", target);
                  }});
}

void FlagSet::Add(const std::string& name, double* target, const std::string& help,
                  const std::string& unit) {
  impl_->AddFlag({.name = name,
                  .help = help,
                  .unit = unit,
                  .default_text = fmt::format("{}", *target),
                  .set = [target](const std::string& text) {
                    double value = 0;
                    TANDEM_RETURN_IF_ERROR(ParseNumber(text, "a number", &value));
                    if (!std::isfinite(value)) {
                      return InvalidArgument("'{}' is not accepted; give a finite number", text);
                    }
                    *target = value;
                    return absl::OkStatus();
                  }});
}

void FlagSet::Add(const std::string& name, std::string* target, const std::string& help,
                  const std::string& unit) {
  impl_->AddFlag({.name = name,
                  .help = help,
                  .unit = unit,
                  .default_text = *target,
                  .set = [target](const std::string& text) {
                    *target = text;
                    return absl::OkStatus();
                  }});
}

void FlagSet::Add(const std::string& name, std::optional<int64_t>* target, const std::string& help,
                  const std::string& unit) {
  impl_->AddFlag(OptionalFlag(name, target, help, unit, "an integer"));
}

void FlagSet::Add(const std::string& name, std::optional<uint64_t>* target, const std::string& help,
                  const std::string& unit) {
  impl_->AddFlag(OptionalFlag(name, target, help, unit, "a non-negative integer"));
}

void FlagSet::Add(const std::string& name, std::optional<double>* target, const std::string& help,
                  const std::string& unit) {
  impl_->AddFlag(OptionalFlag(name, target, help, unit, "a number"));
}

void FlagSet::AddRepeated(const std::string& name, std::vector<std::string>* target,
                          const std::string& help) {
  impl_->AddFlag({.name = name,
                  .help = help,
                  .unit = "may be repeated",
                  .repeated = true,
                  .set = [target](const std::string& text) {
                    target->push_back(text);
                    return absl::OkStatus();
                  }});
}

void FlagSet::AddList(const std::string& name, std::vector<std::string>* target,
                      const std::string& help, const std::string& unit) {
  AddRepeated(name, target, help);
  impl_->flags.back()->unit = unit;
  impl_->flags.back()->list = true;
}

void FlagSet::AddBytes(const std::string& name, int64_t* target, const std::string& help) {
  impl_->AddFlag({.name = name,
                  .help = help,
                  .unit = "bytes",
                  .default_text = std::to_string(*target),
                  .set = [target](const std::string& text) -> absl::Status {
                    TANDEM_ASSIGN_OR_RETURN(*target, ParseBytes(text));
                    return absl::OkStatus();
                  }});
}

void FlagSet::AddChoice(const std::string& name, std::string* target,
                        const std::vector<std::string>& choices, const std::string& help) {
  impl_->AddFlag({.name = name,
                  .help = fmt::format("{}: {}", help, fmt::join(choices, ", ")),
                  .default_text = *target,
                  .set = [target, choices](const std::string& text) {
                    if (std::find(choices.begin(), choices.end(), text) == choices.end()) {
                      const auto nearest = NearestName(text, choices);
                      return InvalidArgument(
                          "'{}' is not one of {}{}", text, fmt::join(choices, ", "),
                          nearest ? fmt::format("; did you mean {}?", *nearest) : "");
                    }
                    *target = text;
                    return absl::OkStatus();
                  }});
}

void FlagSet::AddPositional(const std::string& name, std::string* target, const std::string& help,
                            bool required) {
  impl_->AddFlag({.name = name,
                  .help = help,
                  .default_text = *target,
                  .positional = true,
                  .required = required,
                  .set = [target](const std::string& text) {
                    *target = text;
                    return absl::OkStatus();
                  }});
}

void FlagSet::CollectUnknown(std::vector<std::string>* target) { impl_->unknown = target; }

absl::Status FlagSet::Impl::ParseCommandLine(std::vector<std::string> args, CLI::App* app) {
  app->set_help_flag();
  app->allow_extras();
  for (const auto& flag : flags) {
    if (flag->is_bool) {
      const std::string negated = "--no-" + flag->name.substr(2);
      flag->option = app->add_flag(flag->name + ",!" + negated);
    } else {
      flag->option = app->add_option(flag->name, [](const CLI::results_t&) { return true; });
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
    if (flag == nullptr || flag->is_bool) continue;
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

absl::Status FlagSet::Impl::CheckExtras(const std::vector<std::string>& extras) {
  if (unknown != nullptr) {
    unknown->insert(unknown->end(), extras.begin(), extras.end());
    return absl::OkStatus();
  }
  for (const std::string& extra : extras) {
    if (extra.starts_with("-") && extra.size() > 1) {
      return Unknown("flag", extra.substr(0, extra.find('=')));
    }
  }
  if (!extras.empty()) return InvalidArgument("unexpected argument '{}'", extras.front());
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
  if (flag == nullptr || flag->hidden || name == "--help" || name == "--config") {
    if (flag == nullptr && unknown != nullptr) {
      unknown->push_back(fmt::format("{}={}", name, value.Scalar()));
      return absl::OkStatus();
    }
    const absl::Status status = Unknown("key", name);
    return InvalidArgument("{}{}", origin, MessageOf(status));
  }
  if (flag->option->count() > 0) return absl::OkStatus();
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
  } catch (const std::exception& error) {
    return InvalidArgument("--config: {}: {}", path, error.what());
  }
  return absl::OkStatus();
}

absl::Status FlagSet::Parse(const std::vector<std::string>& args) {
  CLI::App app(impl_->description, impl_->program);
  absl::Status status = impl_->ParseCommandLine(args, &app);
  if (status.ok()) status = impl_->CheckExtras(app.remaining());
  bool missing_allowed = false;
  for (const auto& flag : impl_->flags) {
    if (!status.ok()) break;
    if (flag->option->count() == 0) continue;
    const std::vector<std::string>& results = flag->option->results();
    for (size_t i = flag->repeated ? 0 : results.size() - 1; i < results.size(); ++i) {
      if (status.ok()) status = impl_->Apply(*flag, results[i], "");
    }
    missing_allowed |= HelpRequested();
  }
  if (status.ok() && !missing_allowed && !impl_->config_path.empty()) {
    status = impl_->ApplyYaml(impl_->config_path);
  }
  for (const auto& flag : impl_->flags) {
    if (status.ok() && !missing_allowed && flag->required && flag->option->count() == 0) {
      status = InvalidArgument("{} is missing: {}", flag->name, flag->help);
    }
    flag->option = nullptr;  // belongs to `app`
  }
  return status;
}

absl::Status FlagSet::Parse(int argc, const char* const* argv) {
  return Parse(std::vector<std::string>(argv + std::min(argc, 1), argv + argc));
}

const std::string& FlagSet::program() const { return impl_->program; }

bool FlagSet::HelpRequested() const { return impl_->help || impl_->list; }

std::vector<std::string> FlagSet::Names() const { return impl_->Names(); }

std::string FlagSet::Impl::HelpText() const {
  std::string usage = fmt::format("Usage: {} [flags]", program);
  std::string lines;
  for (const auto& flag : flags) {
    if (flag->hidden) continue;
    if (flag->positional) {
      usage += flag->required ? " " + flag->name : " [" + flag->name + "]";
    }
    std::string left = "  " + flag->name;
    if (flag->is_bool && flag->name != "--help")
      left += fmt::format(", --no-{}", flag->name.substr(2));
    lines += left.size() < kHelpColumn ? fmt::format("{:<{}}", left, kHelpColumn)
                                       : fmt::format("{}\n{:<{}}", left, "", kHelpColumn);
    std::vector<std::string> notes;
    if (!flag->unit.empty()) notes.push_back(flag->unit);
    if (flag->required) notes.push_back("required");
    if (!flag->default_text.empty() && flag->name != "--help") {
      notes.push_back("default " + flag->default_text);
    }
    lines += flag->help;
    if (!notes.empty()) lines += fmt::format(" ({})", fmt::join(notes, "; "));
    lines += "\n";
  }
  if (unknown != nullptr) usage += " [worker flags]";
  return fmt::format("{}\n{}\n\n{}", description, usage, lines);
}

std::string FlagSet::Impl::ListText() const {
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  for (const auto& flag : flags) {
    if (flag->hidden || flag->positional) continue;
    list.push_back({{"name", flag->name},
                    {"boolean", flag->is_bool && flag->name != "--help"},
                    {"unit", flag->unit},
                    {"default", flag->default_text},
                    {"help", flag->help}});
  }
  const nlohmann::ordered_json out = {{"program", program}, {"flags", std::move(list)}};
  return out.dump() + "\n";
}

std::string FlagSet::Help() const { return impl_->list ? impl_->ListText() : impl_->HelpText(); }

}  // namespace tandem
