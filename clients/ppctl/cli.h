// The command line: options, help and the way from a command's name to its function.
#pragma once

#include <string>
#include <vector>

#include "clients/ppctl/context.h"

namespace ppft::ctl {

// Runs one command; the arguments come without the program's name. Returns the exit code. Never throws.
int Run(const std::vector<std::string>& arguments, Terminal* terminal);

}  // namespace ppft::ctl
