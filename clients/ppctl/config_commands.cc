// config list, set, use, delete.
#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "clients/ppctl/commands.h"
#include "clients/ppctl/config.h"
#include "clients/ppctl/format.h"
#include "common/base/status.h"
#include "common/spec/suggest.h"

namespace ppft::ctl {
namespace {

absl::Status CheckName(const std::string& name) {
  const bool good = !name.empty() && name.size() <= 63 && std::all_of(name.begin(), name.end(), [](char c) {
    return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '-' || c == '_' || c == '.';
  });
  return good ? absl::OkStatus() : absl::InvalidArgumentError(absl::StrCat("\"", name, "\" is no name for a context: use 1 to 63 of a-z A-Z 0-9 - _ ."));
}

absl::Status Apply(const std::string& assignment, Settings* settings) {
  const std::vector<std::string> pair = absl::StrSplit(assignment, absl::MaxSplits('=', 1));
  const auto& keys = ConfigKeys();
  if (pair.size() != 2) return absl::InvalidArgumentError(absl::StrCat("\"", assignment, "\" is not KEY=VALUE; the keys are ", absl::StrJoin(keys, ", ")));
  if (std::find(keys.begin(), keys.end(), pair[0]) == keys.end()) {
    const std::string nearest = spec::Nearest(pair[0], keys);
    return absl::InvalidArgumentError(
        absl::StrCat("\"", pair[0], "\" is not a key",
                     nearest.empty() ? absl::StrCat("; the keys are ", absl::StrJoin(keys, ", ")) : absl::StrCat("; did you mean ", nearest, "?")));
  }
  if (pair[1].empty()) {
    settings->erase(pair[0]);
    return absl::OkStatus();
  }
  // A path holds from every folder.
  const bool path = absl::StartsWith(pair[0], "tls_") || pair[0] == "token_file";
  (*settings)[pair[0]] = path ? std::filesystem::absolute(pair[1]).lexically_normal().string() : pair[1];
  return absl::OkStatus();
}

}  // namespace

Result ConfigList(Context& context) {
  PPFT_ASSIGN_OR_RETURN(const Config config, LoadConfig(ConfigPath()));
  if (config.contexts.empty())
    context.err() << "no contexts in " << (config.path.empty() ? "any config file" : config.path) << ": make one with ppctl config set NAME server=HOST:PORT\n";
  if (context.format == Format::kJson || context.format == Format::kYaml) {
    nlohmann::ordered_json all = {{"current_context", config.current}, {"contexts", config.contexts}};
    context.PrintJson(all.dump());
    return kOk;
  }
  std::vector<std::vector<std::string>> rows = {{"", "NAME", "SERVER", "SETTINGS"}};
  for (const auto& [name, settings] : config.contexts) {
    if (context.format == Format::kName) context.out() << name << "\n";
    std::vector<std::string> others;
    for (const auto& [key, value] : settings) {
      if (key != "server") others.push_back(absl::StrCat(key, "=", value));
    }
    const auto server = settings.find("server");
    rows.push_back(
        {name == config.current ? "*" : "", name, server == settings.end() ? "-" : server->second, others.empty() ? "-" : absl::StrJoin(others, " ")});
  }
  if (context.format != Format::kName && rows.size() > 1) context.out() << FormatTable(rows);
  return kOk;
}

Result ConfigSet(Context& context, const std::string& name, const std::vector<std::string>& assignments) {
  PPFT_RETURN_IF_ERROR(CheckName(name));
  PPFT_ASSIGN_OR_RETURN(Config config, LoadConfig(ConfigPath()));
  Settings& settings = config.contexts[name];
  for (const std::string& assignment : assignments) PPFT_RETURN_IF_ERROR(Apply(assignment, &settings));
  if (config.current.empty()) config.current = name;
  PPFT_RETURN_IF_ERROR(SaveConfig(config));
  context.err() << "context " << name << (config.current == name ? ", the current one," : "") << " is set in " << config.path << "\n";
  return kOk;
}

Result ConfigUse(Context& context, const std::string& name) {
  PPFT_ASSIGN_OR_RETURN(Config config, LoadConfig(ConfigPath()));
  PPFT_RETURN_IF_ERROR(ChooseContext(config, name).status());
  config.current = name;
  PPFT_RETURN_IF_ERROR(SaveConfig(config));
  context.err() << "the current context is " << name << "\n";
  return kOk;
}

Result ConfigDelete(Context& context, const std::string& name) {
  PPFT_ASSIGN_OR_RETURN(Config config, LoadConfig(ConfigPath()));
  PPFT_RETURN_IF_ERROR(ChooseContext(config, name).status());
  config.contexts.erase(name);
  if (config.current == name) config.current.clear();
  PPFT_RETURN_IF_ERROR(SaveConfig(config));
  context.err() << "context " << name << " is deleted\n";
  return kOk;
}

}  // namespace ppft::ctl
