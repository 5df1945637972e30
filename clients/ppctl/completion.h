// Shell completion scripts, made from the commands and options that the parser knows.
#pragma once

#include <CLI/App.hpp>
#include <string>

#include "absl/status/statusor.h"

namespace ppft::ctl {

// `shell` is bash, zsh or fish.
absl::StatusOr<std::string> CompletionScript(const CLI::App& app, const std::string& shell);

}  // namespace ppft::ctl
