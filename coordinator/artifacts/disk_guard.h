// DiskGuard: watches the room on the data folder's disk and keeps some for the store, so that a coordinator on a full disk can still write down that
// its jobs pause. EDGE for DATA_DIR/ballast. Thread: one at a time.
#pragma once

#include <cstdint>
#include <string>

#include "coordinator/core/disk.h"

namespace ppft::coordinator {

class DiskGuard {
 public:
  DiskGuard(std::string data_dir, int64_t reserve_bytes);

  // The room now. Gives the ballast up below the critical mark and takes it again when there is room.
  DiskRoom Look();
  // The store could not write although there seemed to be room.
  void GiveUpBallast();

  // Before there is a guard: a store that cannot be opened for lack of room gets the ballast. False if there is none.
  static bool RemoveBallast(const std::string& data_dir);

 private:
  int64_t FreeBytes() const;
  void TakeBallast();

  const std::string data_dir_;
  const DiskMarks marks_;
  const int64_t ballast_bytes_;
  bool ballast_ = false;
  int looks_to_wait_ = 0;  // after the ballast could not be taken
  DiskRoom room_;
};

}  // namespace ppft::coordinator
