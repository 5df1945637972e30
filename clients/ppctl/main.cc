#include <signal.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <cstdlib>
#include <iostream>

#include "clients/ppctl/cli.h"

namespace {

// The first Ctrl-C detaches from a followed job, the second ends the program.
void OnInterrupt(int) {
  ppft::ctl::Interrupted() = true;
  signal(SIGINT, SIG_DFL);
}

bool Follows(const std::vector<std::string>& arguments) {
  for (const std::string& argument : arguments) {
    if (argument == "watch" || argument == "--follow") return arguments[0] != "logs" && arguments[0] != "events";
  }
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  setenv("GRPC_VERBOSITY", "NONE", 0);  // its messages are ours to write
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  if (Follows(arguments)) signal(SIGINT, OnInterrupt);
  ppft::ctl::Terminal terminal{&std::cout, &std::cerr};
  terminal.out_is_terminal = isatty(STDOUT_FILENO);
  const char* kind = std::getenv("TERM");
  const bool dumb = kind == nullptr || std::string(kind) == "dumb";
  terminal.err_is_terminal = isatty(STDERR_FILENO) && !dumb;
  const char* no_color = std::getenv("NO_COLOR");
  terminal.color = terminal.out_is_terminal && !dumb && (no_color == nullptr || *no_color == '\0');
  winsize size{};
  if (ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 20) terminal.width = size.ws_col;
  const int code = ppft::ctl::Run(arguments, &terminal);
  std::cout.flush();
  if (!std::cout && code == 0) {
    std::cerr << "ppctl: the output could not be written\n";
    return ppft::ctl::kFailure;
  }
  return code;
}
