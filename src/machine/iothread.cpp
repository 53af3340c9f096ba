#include "machine/iothread.h"

#include <pthread.h>
#include <unistd.h>

#include <future>
#include <system_error>

namespace wisp {

Result<std::unique_ptr<IoThread>> IoThread::start(std::string id,
                                                  const std::function<Result<void>()>& on_start) {
  WISP_ASSIGN(auto loop, EventLoop::create());
  std::unique_ptr<IoThread> io(new IoThread(std::move(id), std::move(loop)));
  std::promise<Result<void>> started;
  try {
    io->thread_ = std::thread([&started, &on_start, raw = io.get()] {
      // Linux keeps 15 characters of a thread's name.
      const std::string name = ("io-" + raw->id_).substr(0, 15);
      ::pthread_setname_np(::pthread_self(), name.c_str());
      raw->thread_id_ = ::gettid();
      EventLoop& own_loop = raw->loop();
      Result<void> result = on_start();
      const bool run = result.has_value();
      // Last use of what start() owns.
      started.set_value(std::move(result));
      if (run) {
        own_loop.run();
      }
    });
  } catch (const std::system_error& error) {
    return fail("cannot start iothread {}: {}", io->id_, error.code().message());
  }
  WISP_TRY(started.get_future().get());
  return io;
}

IoThread::~IoThread() {
  stop();
}

void IoThread::stop() {
  if (thread_.joinable()) {
    loop_->stop();
    thread_.join();
  }
}

}  // namespace wisp
