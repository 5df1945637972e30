#include "coordinator/core/disk.h"

#include <gtest/gtest.h>

namespace ppft::coordinator {
namespace {

TEST(Disk, TheMarksLieBelowWhatUploadsLeave) {
  const DiskMarks marks = MarksOf(64 << 20);
  EXPECT_LT(marks.critical_bytes, marks.low_bytes);
  EXPECT_LT(marks.low_bytes, marks.high_bytes);
  EXPECT_LE(marks.high_bytes, 64 << 20) << "an upload that just fits fills nothing";
  EXPECT_GE(marks.high_bytes - BallastBytes(64 << 20), marks.low_bytes) << "taking the ballast again must not fill the disk";
}

TEST(Disk, IsFullFromTheLowMarkUntilTheHighOne) {
  const DiskMarks marks{10, 40, 80};
  struct Row {
    int64_t free;
    bool ballast;
    bool full, critical;
  };
  DiskRoom room;
  for (const Row& row : {
           Row{100, true, false, false},
           Row{40, true, false, false},
           Row{39, true, true, false},
           Row{60, true, true, false},  // not enough to go on
           Row{9, true, true, true},
           Row{60, false, true, true},  // the room is the ballast's, given up
           Row{79, false, true, true},
           Row{80, false, false, false},
           Row{79, true, false, false},
       }) {
    room = NextRoom(room, row.free, row.ballast, marks);
    EXPECT_EQ(room.full, row.full) << row.free;
    EXPECT_EQ(room.critical, row.critical) << row.free;
    EXPECT_EQ(room.free_bytes, row.free);
  }
}

}  // namespace
}  // namespace ppft::coordinator
