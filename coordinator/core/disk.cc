#include "coordinator/core/disk.h"

namespace ppft::coordinator {

DiskMarks MarksOf(int64_t reserve_bytes) { return DiskMarks{reserve_bytes / 8, reserve_bytes / 2, reserve_bytes}; }

int64_t BallastBytes(int64_t reserve_bytes) { return reserve_bytes / 4; }

DiskRoom NextRoom(const DiskRoom& before, int64_t free_bytes, bool ballast, const DiskMarks& marks) {
  DiskRoom room;
  room.free_bytes = free_bytes;
  room.high_bytes = marks.high_bytes;
  room.full = free_bytes < (before.full ? marks.high_bytes : marks.low_bytes);
  room.critical = room.full && (free_bytes < marks.critical_bytes || (before.critical && !ballast));
  return room;
}

}  // namespace ppft::coordinator
