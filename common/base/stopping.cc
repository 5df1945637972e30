#include "common/base/stopping.h"

#include <fcntl.h>

#include "common/base/files.h"
#include "common/base/logging.h"
#include "common/base/status.h"

namespace ppft {

void ShowStopping() {
  const Fd name(open("/proc/self/comm", O_WRONLY | O_CLOEXEC));
  const absl::Status written = name ? WriteAll(name.get(), "ppft-stopping", "/proc/self/comm") : absl::NotFoundError("no /proc/self/comm");
  if (!written.ok()) LogWarning("stopping, but the process list does not show it: ", written.message());
}

}  // namespace ppft
