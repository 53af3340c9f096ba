#include "block/io_engine.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <cerrno>

namespace wisp {

std::int64_t run_task(const EngineFiles& files, const IoTask& task) {
  const int fd = files.at(task.file);
  const auto offset = static_cast<off_t>(task.offset);
  const auto length = static_cast<off_t>(task.length);
  std::int64_t result = 0;
  do {
    switch (task.kind) {
      case IoKind::kRead:
        result = ::preadv(fd, task.iov, static_cast<int>(task.iov_count), offset);
        break;
      case IoKind::kWrite:
        result = ::pwritev(fd, task.iov, static_cast<int>(task.iov_count), offset);
        break;
      case IoKind::kSync:
        result = ::fdatasync(fd);
        break;
      case IoKind::kPunchHole:
        result = ::fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length);
        break;
      case IoKind::kZeroRange:
        result = ::fallocate(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, offset, length);
        break;
      case IoKind::kBlkDiscard: {
        std::array<std::uint64_t, 2> range{task.offset, task.length};
        result = ::ioctl(fd, BLKDISCARD, range.data());
        break;
      }
    }
  } while (result < 0 && errno == EINTR);
  return result < 0 ? -errno : result;
}

bool SyncEngine::submit() {
  while (IoTask* const task = queued_.pop()) {
    task->result = run_task(files_, *task);
    finished_.push(*task);
  }
  return true;
}

}  // namespace wisp
