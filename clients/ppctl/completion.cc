#include "clients/ppctl/completion.h"

#include <CLI/CLI.hpp>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "common/spec/suggest.h"

namespace ppft::ctl {
namespace {

std::vector<std::string> Options(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::Option* option : app.get_options()) {
    for (const std::string& name : option->get_lnames()) names.push_back(absl::StrCat("--", name));
    for (const std::string& name : option->get_snames()) names.push_back(absl::StrCat("-", name));
  }
  return names;
}

std::vector<const CLI::App*> Commands(const CLI::App& app) {
  return app.get_subcommands([](const CLI::App*) { return true; });
}

std::vector<std::string> Names(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::App* command : Commands(app)) names.push_back(command->get_name());
  return names;
}

// One case per command: "data show" -> its options.
void BashCases(const CLI::App& app, const std::string& path, std::string* out) {
  for (const CLI::App* command : Commands(app)) {
    const std::string name = path.empty() ? command->get_name() : absl::StrCat(path, " ", command->get_name());
    std::vector<std::string> words = Names(*command);
    for (std::string& option : Options(*command)) words.push_back(std::move(option));
    absl::StrAppend(out, "    \"", name, "\") words=\"", absl::StrJoin(words, " "), "\" ;;\n");
    BashCases(*command, name, out);
  }
}

std::string Bash(const CLI::App& app) {
  std::vector<std::string> groups;
  for (const CLI::App* command : Commands(app)) {
    if (!Commands(*command).empty()) groups.push_back(command->get_name());
  }
  std::string cases;
  BashCases(app, "", &cases);
  return absl::StrCat(R"(_ppctl() {
  local current="${COMP_WORDS[COMP_CWORD]}" command="" word words="" i
  for ((i = 1; i < COMP_CWORD; i++)); do
    word="${COMP_WORDS[i]}"
    case "$word" in
      -*) ;;
      *) if [ -z "$command" ]; then command="$word"
         else case " )",
                      absl::StrJoin(groups, " "), R"( " in *" $command "*) command="$command $word" ;; esac
         fi ;;
    esac
  done
  case "$command" in
    "") words=")",
                      absl::StrJoin(Names(app), " "), "\" ;;\n", cases, R"(  esac
  case "$current" in -*) words="$words )",
                      absl::StrJoin(Options(app), " "), R"(" ;; esac
  mapfile -t COMPREPLY < <(compgen -W "$words" -- "$current")
  [ ${#COMPREPLY[@]} -gt 0 ] || mapfile -t COMPREPLY < <(compgen -f -- "$current")
}
complete -o filenames -F _ppctl ppctl
)");
}

void FishLines(const CLI::App& app, const std::string& condition, std::string* out) {
  const auto quoted = [](const std::string& text) { return absl::StrCat("'", absl::StrReplaceAll(text, {{"'", "\\'"}}), "'"); };
  for (const CLI::App* command : Commands(app)) {
    absl::StrAppend(out, "complete -c ppctl -f -n ", quoted(condition), " -a ", command->get_name(), " -d ", quoted(command->get_description()), "\n");
    const std::string seen = absl::StrCat("__fish_seen_subcommand_from ", command->get_name());
    for (const CLI::Option* option : command->get_options()) {
      for (const std::string& name : option->get_lnames())
        absl::StrAppend(out, "complete -c ppctl -n ", quoted(seen), " -l ", name, " -d ", quoted(option->get_description()), "\n");
    }
    FishLines(*command, absl::StrCat(seen, "; and not __fish_seen_subcommand_from ", absl::StrJoin(Names(*command), " ")), out);
  }
}

std::string Fish(const CLI::App& app) {
  std::string out;
  for (const std::string& option : Options(app)) {
    if (option.rfind("--", 0) == 0) absl::StrAppend(&out, "complete -c ppctl -l ", option.substr(2), "\n");
  }
  FishLines(app, "__fish_use_subcommand", &out);
  return out;
}

}  // namespace

absl::StatusOr<std::string> CompletionScript(const CLI::App& app, const std::string& shell) {
  if (shell == "bash") return Bash(app);
  // zsh runs bash's completions itself; mapfile is bash's alone.
  if (shell == "zsh") {
    return absl::StrCat(
        "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n",
        absl::StrReplaceAll(Bash(app),
                            {{"mapfile -t COMPREPLY < <(compgen -W \"$words\" -- \"$current\")", "COMPREPLY=($(compgen -W \"$words\" -- \"$current\"))"},
                             {"mapfile -t COMPREPLY < <(compgen -f -- \"$current\")", "COMPREPLY=($(compgen -f -- \"$current\"))"}}));
  }
  if (shell == "fish") return Fish(app);
  return absl::InvalidArgumentError(absl::StrCat("\"", shell, "\" is not known", spec::UseOneOf(shell, {"bash", "zsh", "fish"})));
}

}  // namespace ppft::ctl
