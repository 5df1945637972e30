// The user's config file: named contexts, each a coordinator and how to talk to it. EDGE for that file.
//
//   current_context: lab
//   contexts:
//     lab: {server: "lab:7070", tls_ca: ca.pem, tls_cert: me.pem, tls_key: me.key, token_file: token, timeout: 1m, output: table}
//
// A flag counts before its environment variable, that before the context, the context before the default.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace ppft::ctl {

using Settings = std::map<std::string, std::string>;  // by key; keys are those of ConfigKeys()

const std::vector<std::string>& ConfigKeys();

struct Config {
  std::string path;
  std::string current;  // "" if none is
  std::map<std::string, Settings> contexts;
};

// PPCTL_CONFIG, or ppctl/config.yaml under XDG_CONFIG_HOME or ~/.config; "" without a home.
std::string ConfigPath();

// A file that is not there is an empty config. INVALID_ARGUMENT names file, line and key. Relative paths in it count from its folder.
absl::StatusOr<Config> LoadConfig(const std::string& path);
absl::Status SaveConfig(const Config& config);

// The settings of `name`, or of the current context for ""; none if there is no current one. INVALID_ARGUMENT for a name that is not there.
absl::StatusOr<Settings> ChooseContext(const Config& config, const std::string& name);

}  // namespace ppft::ctl
