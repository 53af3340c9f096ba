// A stream of bytes to and from the outside (terminal, pty, socket, file), as devices see it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>

namespace wisp {

// Who gets the bytes that come in. Called on the event loop of the back end, never while one of the back
// end's own functions is on the stack of the same thread.
class CharReceiver {
 public:
  virtual ~CharReceiver() = default;
  // How many bytes it would take now; 0 stops the reading until CharBackend::resume_input().
  [[nodiscard]] virtual std::size_t can_receive() = 0;
  virtual void receive(std::span<const std::uint8_t> bytes) = 0;
  // A peer came or went (sockets, ptys).
  virtual void connected() {}
  virtual void disconnected() {}
  // After a write that took less than all: there is room again.
  virtual void writable() {}
  // The terminal's size changed.
  virtual void resized(std::uint16_t /*columns*/, std::uint16_t /*rows*/) {}
  // The user asked for a break on the line (escape key, b).
  virtual void receive_break() {}
};

// Thread-safe. Never blocks: what the outside does not take at once waits in a bounded buffer. Destroyed by
// its owner, never from a callback, after the receiver has been taken out.
//
// Locks: a receiver may call any function of its back end while it holds its own lock, except set_receiver(),
// which waits for a running callback.
class CharBackend {
 public:
  virtual ~CharBackend() = default;
  // Takes as many of the bytes as fit its buffer and returns the count. With no peer connected, bytes are
  // dropped and counted as taken.
  virtual std::size_t write(std::span<const std::uint8_t> bytes) = 0;
  // Bytes come in from now on; null ends it. One receiver at a time. After set_receiver(nullptr) returns, the
  // old receiver is not called any more (unless called on the loop's thread from within a callback of that
  // receiver).
  virtual void set_receiver(CharReceiver* receiver) = 0;
  // The receiver has room again.
  virtual void resume_input() = 0;
  // What a user needs to reach it: "pty:/dev/pts/3", "unix:/run/x.sock", ...
  [[nodiscard]] virtual std::string description() const = 0;
  // Whether a peer is there.
  [[nodiscard]] virtual bool is_connected() const = 0;
  // The terminal's size (columns, rows) where it is one; 0, 0 else.
  [[nodiscard]] virtual std::pair<std::uint16_t, std::uint16_t> size() const { return {0, 0}; }
  // Looks at the terminal's size again and tells the receiver where it changed: for the owner of SIGWINCH.
  virtual void refresh_size() {}
};

}  // namespace wisp
