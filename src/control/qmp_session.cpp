#include "control/qmp_session.h"

#include <sys/socket.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <utility>

namespace wisp {
namespace {

constexpr std::size_t kChunk = 16U << 10;

Json error_json(const QmpError& error) {
  return {{"class", error_class_name(error.error_class)}, {"desc", error.text}};
}

// The descriptors in a received control message, made ours at once.
std::vector<UniqueFd> take_rights(msghdr& header) {
  std::vector<UniqueFd> fds;
  for (cmsghdr* control = CMSG_FIRSTHDR(&header); control != nullptr;
       control = CMSG_NXTHDR(&header, control)) {
    if (control->cmsg_level != SOL_SOCKET || control->cmsg_type != SCM_RIGHTS) {
      continue;
    }
    const std::size_t count = (control->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (std::size_t i = 0; i < count; ++i) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(control) + i * sizeof fd, sizeof fd);
      fds.emplace_back(fd);
    }
  }
  return fds;
}

}  // namespace

void QmpSession::close(std::string reason) {
  if (!closed_) {
    closed_ = true;
    reason_ = std::move(reason);
    watch_.stop();
    fd_.reset();
    fds_ = {};
  }
}

void QmpSession::on_events(std::uint32_t events) {
  if ((events & EPOLLOUT) != 0) {
    flush();
  }
  if (!closed_ && (events & EPOLLIN) != 0 && !input_done_) {
    receive();
  }
  const bool gone = (events & (EPOLLERR | EPOLLHUP)) != 0;
  if (!closed_ && gone && !more_work_ && ((events & EPOLLIN) == 0 || input_done_)) {
    close({});  // nobody is left to read an answer
    return;
  }
  work();
}

void QmpSession::receive() {
  std::array<char, kChunk> bytes;
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int) * QmpFds::kMaxArrived)> control{};
  iovec part{.iov_base = bytes.data(), .iov_len = bytes.size()};
  msghdr header{};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  header.msg_control = control.data();
  header.msg_controllen = control.size();
  const ssize_t got = ::recvmsg(fd_.get(), &header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  if (got < 0) {
    if (errno != EAGAIN && errno != EINTR) {
      close({});
    }
    return;
  }
  if (auto fds = take_rights(header); !fds.empty()) {
    // Those that no getfd claimed are gone, as in QEMU.
    fds_.arrived = std::move(fds);
  }
  if (got == 0) {
    input_done_ = true;
    return;
  }
  framer_.push(std::string_view(bytes.data(), static_cast<std::size_t>(got)));
}

void QmpSession::work() {
  more_work_ = false;
  for (int taken = 0; !closed_; ++taken) {
    if (unsent() > kOutputPause) {
      break;
    }
    if (taken == kCommandsPerTurn) {
      more_work_ = true;
      break;
    }
    const auto message = framer_.next();
    if (!message) {
      if (framer_.overflowed()) {
        input_done_ = true;
      }
      break;
    }
    answer(*message);
  }
  if (!closed_ && input_done_ && !more_work_ && unsent() == 0) {
    close({});
    return;
  }
  update_watch();
}

void QmpSession::answer(const Result<std::string>& message) {
  Json reply = Json::object();
  std::function<void()> after_reply;
  const auto fail_with = [&](std::string text) {
    reply["error"] = error_json({.error_class = QmpErrorClass::kGeneric, .text = std::move(text)});
  };
  if (!message) {
    fail_with(message.error().message);
  } else if (const auto request = parse_json(*message); !request) {
    fail_with(request.error().message);
  } else {
    // Any first request ends the greeting, not only qmp_capabilities.
    negotiated_ = true;
    auto result = host_.run(fds_, *request, after_reply);
    if (result) {
      reply["return"] = *std::move(result);
    } else {
      reply["error"] = error_json(result.error());
    }
    if (request->is_object()) {
      if (const auto id = request->find("id"); id != request->end()) {
        reply["id"] = *id;
      }
    }
  }
  send(json_line(reply));
  if (after_reply) {
    after_reply();
  }
}

void QmpSession::send(const std::string& line) {
  if (closed_) {
    return;
  }
  if (unsent() + line.size() > kOutputMax) {
    close(fmt::format("it left {} bytes unread", unsent()));
    return;
  }
  out_ += line;
  flush();
  if (!closed_) {
    update_watch();
  }
}

void QmpSession::flush() {
  while (!closed_ && sent_ < out_.size()) {
    const ssize_t sent =
        ::send(fd_.get(), out_.data() + sent_, out_.size() - sent_, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0) {
      if (errno == EINTR) {
        continue;
      }
      if (errno != EAGAIN) {
        close({});
      }
      break;
    }
    sent_ += static_cast<std::size_t>(sent);
  }
  if (sent_ == out_.size()) {
    out_.clear();
    sent_ = 0;
    if (out_.capacity() > kOutputPause) {
      out_.shrink_to_fit();
    }
  } else if (sent_ > kOutputPause) {
    out_.erase(0, sent_);
    sent_ = 0;
  }
}

void QmpSession::update_watch() {
  if (closed_) {
    return;
  }
  const bool read = !input_done_ && !more_work_ && unsent() <= kOutputPause;
  const std::uint32_t events = (read ? EPOLLIN : 0U) | (unsent() > 0 ? EPOLLOUT : 0U);
  if (events != waiting_for_) {
    waiting_for_ = events;
    watch_.set_events(events);
  }
}

}  // namespace wisp
