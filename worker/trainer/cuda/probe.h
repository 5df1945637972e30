// What the agent asks a trainer about its host, since the agent itself never sees torch.
#pragma once

#include <string>

namespace ppft::trainer {

// "LibTorch 2.11.0 at FOLDER".
std::string RunningTorch();
// {"devices": [{"index", "name", "uuid", "memory_bytes", "compute_capability", "driver"} …]} or {"devices": [], "error": "why there is none"}, in one line.
std::string ProbeDevices();

}  // namespace ppft::trainer
