#include "coordinator/artifacts/disk_guard.h"

#include <fcntl.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <utility>

#include "common/base/files.h"
#include "common/base/logging.h"

namespace ppft::coordinator {
namespace {

constexpr char kBallastFile[] = "ballast";
constexpr int kLooksBetweenTries = 1000;

}  // namespace

DiskGuard::DiskGuard(std::string data_dir, int64_t reserve_bytes)
    : data_dir_(std::move(data_dir)), marks_(MarksOf(reserve_bytes)), ballast_bytes_(BallastBytes(reserve_bytes)) {
  const auto size = FileSize(JoinPath(data_dir_, kBallastFile));
  ballast_ = size.ok() && *size == ballast_bytes_;
  room_.free_bytes = FreeBytes();
}

int64_t DiskGuard::FreeBytes() const {
  struct statvfs disk;
  if (statvfs(data_dir_.c_str(), &disk) != 0) return room_.free_bytes;
  return static_cast<int64_t>(disk.f_bavail) * static_cast<int64_t>(disk.f_frsize);
}

DiskRoom DiskGuard::Look() {
  const bool was_full = room_.full, was_critical = room_.critical;
  room_ = NextRoom(room_, FreeBytes(), ballast_, marks_);
  if (room_.critical && ballast_) GiveUpBallast();
  if (!room_.full && !ballast_ && room_.free_bytes - ballast_bytes_ >= marks_.low_bytes) TakeBallast();
  if (room_.full && !was_full) LogWarning("DISK_FULL: ", data_dir_, " has ", room_.free_bytes, " bytes free; jobs go on when there are ", marks_.high_bytes);
  if (room_.critical && !was_critical) LogWarning("DISK_FULL: running jobs pause too");
  if (!room_.full && was_full) LogInfo("there is room on the disk of ", data_dir_, " again: ", room_.free_bytes, " bytes");
  return room_;
}

void DiskGuard::GiveUpBallast() {
  RemoveBallast(data_dir_);
  ballast_ = false;
  room_.full = room_.critical = true;
}

bool DiskGuard::RemoveBallast(const std::string& data_dir) { return unlink(JoinPath(data_dir, kBallastFile).c_str()) == 0; }

// Best effort: without it the store has what the marks leave.
void DiskGuard::TakeBallast() {
  if (looks_to_wait_-- > 0) return;
  looks_to_wait_ = 0;
  const std::string path = JoinPath(data_dir_, kBallastFile);
  const Fd fd(open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  if (!fd) return;
  if (posix_fallocate(fd.get(), 0, ballast_bytes_) == 0) {
    ballast_ = true;
  } else {
    unlink(path.c_str());
    looks_to_wait_ = kLooksBetweenTries;
  }
}

}  // namespace ppft::coordinator
