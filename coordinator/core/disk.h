// How full the data folder's disk is, and what follows from it. PURE.
#pragma once

#include <cstdint>
#include <limits>

namespace ppft::coordinator {

// Free bytes at which something changes; critical < low < high.
struct DiskMarks {
  int64_t critical_bytes = 0;  // below: the store gets the ballast, running jobs pause too
  int64_t low_bytes = 0;       // below: nothing new starts
  int64_t high_bytes = 0;      // from here on: everything goes on
};

struct DiskRoom {
  int64_t free_bytes = std::numeric_limits<int64_t>::max();
  int64_t high_bytes = 0;
  bool full = false;      // no job is accepted or started, those that wait are PAUSED
  bool critical = false;  // the store itself is short of room: those that run pause too
};

// Uploads leave `reserve_bytes` free; the marks lie below it, so that an upload alone never fills the disk in this sense.
DiskMarks MarksOf(int64_t reserve_bytes);
// Kept in a file that is given up for the store when the disk is full.
int64_t BallastBytes(int64_t reserve_bytes);

// Full from the low mark on until there are high_bytes again. `ballast`: it is still there.
DiskRoom NextRoom(const DiskRoom& before, int64_t free_bytes, bool ballast, const DiskMarks& marks);

}  // namespace ppft::coordinator
