// A process that was told to stop may need seconds for it. Whoever looks at it (ps, deploy/local) sees that it is on its way out.
#pragma once

namespace ppft {

// Its command name becomes "ppft-stopping". From any thread.
void ShowStopping();

}  // namespace ppft
