// `tandem completion bash|zsh`: completion scripts, made from the same tables as the help.
#include <map>

#include "absl/strings/str_replace.h"
#include "fmt/format.h"
#include "fmt/ranges.h"

#include "cli/command.h"
#include "cli/program_flags.h"

namespace tandem::cli {
namespace {

constexpr const char* kServers[] = {kRouterProgram, kPrefillProgram, kDecodeProgram};

// What follows `tandem`, or a server's name, and its flags.
struct Completed {
  std::string name;
  std::string summary;
  FlagTable table;
};

std::vector<std::string> FlagWords(const FlagTable& table) {
  std::vector<std::string> words;
  for (const FlagInfo& info : table.flags) {
    words.push_back(info.name);
    if (info.boolean) words.push_back("--no-" + info.name.substr(2));
  }
  return words;
}

bool TakesValue(const FlagInfo& info) {
  return !info.boolean && info.name != "--help" && info.name != "--version";
}

// A list of words, or what compgen is to look for: files, directories, nothing.
std::string BashValues(const FlagInfo& info) {
  if (!info.choices.empty()) return fmt::format("-W '{}'", fmt::join(info.choices, " "));
  if (info.unit == "directory") return "-d";
  if (info.unit == "path") return "-f";
  return "-W ''";
}

std::string BashCase(const Completed& entry) {
  std::string out =
      fmt::format("    {}) flags='{}'\n", entry.name, fmt::join(FlagWords(entry.table), " "));
  std::map<std::string, std::vector<std::string>> by_values;
  for (const FlagInfo& info : entry.table.flags) {
    if (TakesValue(info)) by_values[BashValues(info)].push_back(info.name);
  }
  out += "      case $prev in\n";
  for (const auto& [values, names] : by_values) {
    out += fmt::format("        {}) values=\"{}\" ;;\n", fmt::join(names, "|"), values);
  }
  return out + "      esac ;;\n";
}

std::string BashScript(const std::vector<Completed>& entries) {
  std::vector<std::string> names = {"help", "serve"};
  std::string cases;
  for (const Completed& entry : entries) {
    if (!entry.name.starts_with("tandem_")) names.push_back(entry.name);
    cases += BashCase(entry);
  }
  return fmt::format(
      R"sh(# bash completion of tandem. For this shell: source <(tandem completion bash)
_tandem() {{
  local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD - 1]}}
  local flags= values= key=${{COMP_WORDS[0]##*/}}
  if [[ $prev == '=' ]]; then prev=${{COMP_WORDS[COMP_CWORD - 2]}}; fi  # --flag=value is three words
  if [[ $cur == '=' ]]; then cur=; fi
  if [[ $key == tandem ]]; then
    if ((COMP_CWORD == 1)); then
      COMPREPLY=($(compgen -W '{}' -- "$cur"))
      return
    fi
    key=${{COMP_WORDS[1]}}
    if [[ $key == serve ]]; then key=up; fi
  fi
  case $key in
{}  esac
  if [[ -n $values ]]; then
    eval "COMPREPLY=(\$(compgen $values -- \"\$cur\"))"
  elif [[ $cur == -* ]]; then
    COMPREPLY=($(compgen -W "$flags" -- "$cur"))
  else
    COMPREPLY=($(compgen -f -- "$cur"))
  fi
}}
complete -o filenames -F _tandem tandem {}
)sh",
      fmt::join(names, " "), cases, fmt::join(kServers, " "));
}

// In single quotes, for _arguments.
std::string ZshQuote(const std::string& text) {
  return absl::StrReplaceAll(text, {{"'", "'\\''"}, {"[", "\\["}, {"]", "\\]"}, {":", "\\:"}});
}

std::string ZshValues(const FlagInfo& info) {
  if (!info.choices.empty()) return fmt::format("({})", fmt::join(info.choices, " "));
  if (info.unit == "directory") return "_files -/";
  if (info.unit == "path") return "_files";
  return " ";
}

std::string ZshCase(const Completed& entry) {
  std::string out = fmt::format("    {}) _arguments", entry.name);
  for (const FlagInfo& info : entry.table.flags) {
    const std::string help = ZshQuote(info.help);
    if (!TakesValue(info)) {
      out += fmt::format(" \\\n      '{}[{}]'", info.name, help);
      if (info.boolean) out += fmt::format(" \\\n      '--no-{}[not that]'", info.name.substr(2));
      continue;
    }
    const std::string what = info.unit.empty() ? "value" : ZshQuote(info.unit);
    out += fmt::format(" \\\n      '{}=[{}]:{}:{}'", info.name, help, what, ZshValues(info));
  }
  return out + " \\\n      '*:file:_files' ;;\n";
}

std::string ZshScript(const std::vector<Completed>& entries) {
  std::string names = "'serve:the same as up'";
  std::string cases;
  for (const Completed& entry : entries) {
    if (!entry.name.starts_with("tandem_")) {
      names += fmt::format(" \\\n      '{}:{}'", entry.name, ZshQuote(entry.summary));
    }
    cases += ZshCase(entry);
  }
  return fmt::format(
      R"sh(#compdef tandem {}
# zsh completion of tandem. Put this into a file _tandem in a folder of $fpath.
_tandem() {{
  local key=$service
  if [[ $key == tandem ]]; then
    if ((CURRENT == 2)); then
      local -a commands=({})
      _describe command commands
      return
    fi
    shift words
    ((CURRENT--))
    key=$words[1]
    if [[ $key == serve ]]; then key=up; fi
  fi
  case $key in
{}  esac
}}
_tandem "$@"
)sh",
      fmt::join(kServers, " "), names, cases);
}

}  // namespace

int RunCompletion(const Arguments& arguments) {
  FlagSet flags("tandem completion",
                "Prints what makes a shell complete commands, flags and their values.");
  std::string shell;
  flags.AddPositional("SHELL", &shell, "bash or zsh", true);
  flags.Example("source <(tandem completion bash)  # in this shell");
  flags.Example("tandem completion bash >~/.local/share/bash-completion/completions/tandem");
  flags.Example("tandem completion zsh >~/.zfunc/_tandem  # with ~/.zfunc in $fpath");
  if (const auto exit_code = ParseOrExit(&flags, arguments)) return *exit_code;
  if (shell != "bash" && shell != "zsh") {
    fmt::print(stderr, "tandem completion: SHELL must be bash or zsh, got '{}'\n", shell);
    return kExitUsage;
  }
  std::vector<Completed> entries;
  std::vector<std::vector<std::string>> programs;
  for (const Command& command : Commands()) {
    entries.push_back({.name = command.name, .summary = command.summary});
    programs.push_back({ProgramPath("tandem"), command.name});
  }
  const auto tables = AskForFlags(programs);
  if (!tables.ok()) return Fail("completion", tables.status());
  for (size_t i = 0; i < entries.size(); ++i) entries[i].table = (*tables)[i];
  for (const FlagTable& table : ServerFlagTables()) {
    entries.push_back({.name = table.program, .table = table});
  }
  fmt::print("{}", shell == "bash" ? BashScript(entries) : ZshScript(entries));
  return kExitOk;
}

}  // namespace tandem::cli
