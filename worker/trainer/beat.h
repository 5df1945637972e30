// The page of shared memory through which a trainer shows that it is alive and where it is. The agent creates the file (one page of zeros, Start.beat_path),
// the trainer writes, the agent reads: a counter that stands still for longer than the section's budget is a hang, however slow the work may be.
//
// Every field is a lock-free atomic, written with relaxed order except `counter`, which is written last (release). A reader may see a mix of two
// neighbouring beats; the counter alone decides about progress.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <string>

namespace ppft::trainer {

enum class Section : uint32_t {
  kStarting = 0,
  kLoading = 1,     // model, data, checkpoint
  kConnecting = 2,  // waits for peers
  kForward = 3,
  kBackward = 4,
  kSend = 5,     // waits for room in a queue
  kReceive = 6,  // waits for a peer
  kReduce = 7,   // waits for all peers
  kOptimizer = 8,
  kCheckpoint = 9,
  kExport = 10,
  kDone = 11,
  kAwaitExport = 12,  // waits for peers whose export takes as long as their disks need
};

inline const char* SectionName(Section section) {
  static constexpr const char* kNames[] = {"starting", "loading",   "connecting", "forward", "backward", "send",        "receive",
                                           "reduce",   "optimizer", "checkpoint", "export",  "done",     "await_export"};
  const auto index = static_cast<uint32_t>(section);
  return index < sizeof(kNames) / sizeof(kNames[0]) ? kNames[index] : "unknown";
}

// The rank stands still because another one does: its own transport gives up after limits.stall_timeout and names the peer.
inline bool WaitsForPeer(Section section) {
  return section == Section::kConnecting || section == Section::kSend || section == Section::kReceive || section == Section::kReduce;
}

inline constexpr uint32_t kBeatMagic = 0x54414542;  // "BEAT"
inline constexpr int64_t kBeatBytes = 4096;

struct Beat {
  std::atomic<uint32_t> magic;  // kBeatMagic once the trainer has mapped the page
  std::atomic<uint32_t> section;
  std::atomic<int64_t> step;  // optimizer step being worked on; 0 before the first
  std::atomic<int64_t> microbatch;
  std::atomic<uint64_t> counter;  // grows with every beat
};
static_assert(std::atomic<uint64_t>::is_always_lock_free && sizeof(Beat) <= kBeatBytes);

// Maps the page of an existing file of at least kBeatBytes; nullptr with errno set if that fails. Stays mapped for the life of the process or until UnmapBeat.
inline Beat* MapBeat(const std::string& path) {
  const int fd = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (fd < 0) return nullptr;
  void* page = mmap(nullptr, kBeatBytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  return page == MAP_FAILED ? nullptr : static_cast<Beat*>(page);
}

inline void UnmapBeat(Beat* beat) {
  if (beat != nullptr) munmap(beat, kBeatBytes);
}

// Another one in the same place.
inline void AddBeat(Beat* beat) {
  if (beat != nullptr) beat->counter.fetch_add(1, std::memory_order_release);
}

inline void WriteBeat(Beat* beat, Section section, int64_t step, int64_t microbatch) {
  if (beat == nullptr) return;
  beat->section.store(static_cast<uint32_t>(section), std::memory_order_relaxed);
  beat->step.store(step, std::memory_order_relaxed);
  beat->microbatch.store(microbatch, std::memory_order_relaxed);
  AddBeat(beat);
}

}  // namespace ppft::trainer
