#include "clients/ppctl/config.h"

#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/files.h"
#include "common/base/status.h"
#include "common/spec/suggest.h"

namespace ppft::ctl {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kMaxConfigBytes = 1 << 20;

bool IsPath(const std::string& key) { return key == "tls_ca" || key == "tls_cert" || key == "tls_key" || key == "token_file"; }

std::string Variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

absl::Status Wrong(const std::string& path, const YAML::Mark& mark, const std::string& what) {
  return absl::InvalidArgumentError(absl::StrCat(path, ":", mark.line + 1, ": ", what));
}

std::string DidYouMean(const std::string& word, const std::vector<std::string>& words) {
  const std::string nearest = spec::Nearest(word, words);
  return nearest.empty() ? absl::StrCat(": the keys are ", absl::StrJoin(words, ", ")) : absl::StrCat("; did you mean ", nearest, "?");
}

absl::StatusOr<Settings> ReadContext(const std::string& path, const std::string& name, const YAML::Node& node) {
  if (!node.IsMap()) return Wrong(path, node.Mark(), absl::StrCat("context ", name, " must be a group of keys: ", absl::StrJoin(ConfigKeys(), ", ")));
  Settings settings;
  for (const auto& entry : node) {
    const auto key = entry.first.as<std::string>();
    const auto& known = ConfigKeys();
    if (std::find(known.begin(), known.end(), key) == known.end())
      return Wrong(path, entry.first.Mark(), absl::StrCat("contexts.", name, ".", key, " is not a known key", DidYouMean(key, known)));
    if (!entry.second.IsScalar()) return Wrong(path, entry.second.Mark(), absl::StrCat("contexts.", name, ".", key, " must be one value"));
    auto value = entry.second.as<std::string>();
    if (IsPath(key) && !value.empty() && value[0] != '/') value = (fs::path(path).parent_path() / value).string();
    settings[key] = std::move(value);
  }
  return settings;
}

absl::StatusOr<Config> Read(const std::string& path, const std::string& text) {
  Config config;
  config.path = path;
  const YAML::Node root = YAML::Load(text);
  if (root.IsNull()) return config;
  if (!root.IsMap()) return Wrong(path, root.Mark(), "must hold the keys current_context and contexts");
  for (const auto& entry : root) {
    const auto key = entry.first.as<std::string>();
    if (key == "current_context") {
      config.current = entry.second.as<std::string>("");
    } else if (key == "contexts" && entry.second.IsMap()) {
      for (const auto& context : entry.second) {
        const auto name = context.first.as<std::string>();
        PPFT_ASSIGN_OR_RETURN(config.contexts[name], ReadContext(path, name, context.second));
      }
    } else {
      return Wrong(path, entry.first.Mark(),
                   key == "contexts" ? "contexts must be a group of named contexts"
                                     : absl::StrCat(key, " is not a known key", DidYouMean(key, {"current_context", "contexts"})));
    }
  }
  return config;
}

}  // namespace

const std::vector<std::string>& ConfigKeys() {
  static const auto* const keys = new std::vector<std::string>{"server", "tls_ca", "tls_cert", "tls_key", "token_file", "timeout", "output"};
  return *keys;
}

std::string ConfigPath() {
  if (const std::string path = Variable("PPCTL_CONFIG"); !path.empty()) return path;
  if (const std::string folder = Variable("XDG_CONFIG_HOME"); !folder.empty()) return JoinPath(folder, "ppctl/config.yaml");
  const std::string home = Variable("HOME");
  return home.empty() ? "" : JoinPath(home, ".config/ppctl/config.yaml");
}

absl::StatusOr<Config> LoadConfig(const std::string& path) {
  Config config;
  config.path = path;
  if (path.empty() || !PathExists(path)) return config;
  const absl::StatusOr<std::string> text = ReadFile(path, kMaxConfigBytes);
  if (!text.ok()) return absl::InvalidArgumentError(text.status().message());
  try {
    return Read(path, *text);
  } catch (const YAML::Exception& error) {
    return Wrong(path, error.mark, absl::StrCat("is not valid YAML: ", error.msg));
  }
}

absl::Status SaveConfig(const Config& config) {
  if (config.path.empty()) return absl::FailedPreconditionError("there is no home folder for the config file: set PPCTL_CONFIG to its path");
  YAML::Emitter out;
  out << YAML::BeginMap;
  if (!config.current.empty()) out << YAML::Key << "current_context" << YAML::Value << config.current;
  out << YAML::Key << "contexts" << YAML::Value << YAML::BeginMap;
  for (const auto& [name, settings] : config.contexts) {
    out << YAML::Key << name << YAML::Value << YAML::BeginMap;
    for (const std::string& key : ConfigKeys()) {
      const auto value = settings.find(key);
      if (value != settings.end()) out << YAML::Key << key << YAML::Value << value->second;
    }
    out << YAML::EndMap;
  }
  out << YAML::EndMap << YAML::EndMap;
  std::error_code error;
  fs::create_directories(fs::path(config.path).parent_path(), error);
  return WriteFileAtomic(config.path, absl::StrCat(out.c_str(), "\n"));
}

absl::StatusOr<Settings> ChooseContext(const Config& config, const std::string& name) {
  const std::string chosen = name.empty() ? config.current : name;
  if (chosen.empty()) return Settings();
  const auto found = config.contexts.find(chosen);
  if (found != config.contexts.end()) return found->second;
  std::vector<std::string> names;
  for (const auto& [known, settings] : config.contexts) names.push_back(known);
  const std::string nearest = spec::NearestName(chosen, names), file = config.path.empty() ? "any config file" : config.path;
  return absl::InvalidArgumentError(absl::StrCat("there is no context \"", chosen, "\" in ", file,
                                                 !nearest.empty() ? absl::StrCat("; did you mean ", nearest, "?")
                                                 : names.empty()  ? ": make it with ppctl config set NAME server=HOST:PORT"
                                                                  : absl::StrCat(": there are ", absl::StrJoin(names, ", "))));
}

}  // namespace ppft::ctl
