#include <fcntl.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <poll.h>
#include <pty.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <termios.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <thread>

#include "chardev/byte_ring.h"
#include "chardev/char_config.h"
#include "chardev/escape_filter.h"
#include "chardev/pty_backend.h"
#include "chardev/recording_receiver.h"
#include "chardev/ring_backend.h"
#include "chardev/stdio_backend.h"

namespace wisp {
namespace {

std::span<const std::uint8_t> bytes_of(const std::string& text) {
  return {reinterpret_cast<const std::uint8_t*>(text.data()), text.size()};
}

class CharTest : public ::testing::Test {
 protected:
  CharTest() {
    ::signal(SIGPIPE, SIG_IGN);
    std::string name = "/tmp/wisp-chardev-XXXXXX";
    EXPECT_NE(::mkdtemp(name.data()), nullptr);
    dir_ = name;
  }
  ~CharTest() override {
    backend_.reset();
    std::filesystem::remove_all(dir_);
  }

  void create(const CharConfig& config) {
    auto made = create_char_backend(config, *loop_, log_);
    ASSERT_TRUE(made.has_value()) << made.error().message;
    backend_ = *std::move(made);
    backend_->set_receiver(&receiver_);
  }
  std::string error_of(const CharConfig& config) {
    const auto made = create_char_backend(config, *loop_, log_);
    return made.has_value() ? "" : made.error().message;
  }
  // Runs the loop until the condition holds, for at most five seconds.
  void run_until(const std::function<bool()>& condition) {
    for (int i = 0; i < 500 && !condition(); ++i) {
      loop_->run_once(10);
    }
    EXPECT_TRUE(condition());
  }
  // Runs the loop until nothing happens any more.
  void settle() {
    for (int i = 0; i < 20; ++i) {
      loop_->run_once(1);
    }
  }
  std::string read_some(int fd, std::size_t wanted) {
    std::string text;
    std::array<char, 65536> buffer;
    for (int i = 0; i < 2000 && text.size() < wanted; ++i) {
      loop_->run_once(1);
      const ssize_t count = ::recv(fd, buffer.data(), buffer.size(), MSG_DONTWAIT);
      const ssize_t other = count < 0 && errno == ENOTSOCK ? ::read(fd, buffer.data(), buffer.size()) : count;
      if (other > 0) {
        text.append(buffer.data(), static_cast<std::size_t>(other));
      }
    }
    return text;
  }
  static void send_all(int fd, const std::string& text) {
    ASSERT_EQ(::write(fd, text.data(), text.size()), static_cast<ssize_t>(text.size()));
  }
  UniqueFd connect_to(const std::string& path) {
    UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::copy(path.begin(), path.end(), address.sun_path);
    EXPECT_EQ(::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
    return fd;
  }
  std::string socket_path() const { return dir_ + "/socket"; }
  CharConfig server() const {
    return {.kind = CharKind::kSocket, .id = "c0", .path = socket_path(), .server = true, .wait = false};
  }

  std::unique_ptr<EventLoop> loop_ = *EventLoop::create();
  Log log_{-1};
  std::string dir_;
  RecordingReceiver receiver_;
  std::unique_ptr<CharBackend> backend_;
};

TEST(ByteRing, KeepsOrderAroundItsEnd) {
  ByteRing ring(10);
  std::string expected;
  std::string got;
  int next = 0;
  for (int round = 0; round < 1000; ++round) {
    std::string in;
    for (int i = 0; i < round % 13; ++i) {
      in += static_cast<char>('a' + next++ % 26);
    }
    const std::size_t room = ring.room();
    const std::size_t taken = ring.push(bytes_of(in));
    EXPECT_EQ(taken, std::min(room, in.size()));
    next -= static_cast<int>(in.size() - taken);
    expected += in.substr(0, taken);
    std::array<std::uint8_t, 7> out{};
    const std::size_t count = ring.peek(std::span(out).first(static_cast<std::size_t>(round % 8)));
    got.append(out.begin(), out.begin() + static_cast<std::ptrdiff_t>(count));
    ring.drop(count);
  }
  EXPECT_EQ(got, expected.substr(0, got.size()));
  EXPECT_EQ(got.size() + ring.size(), expected.size());
}

TEST(EscapeFilter, KeysAfterTheEscapeKey) {
  int quits = 0;
  int breaks = 0;
  int helps = 0;
  EscapeFilter filter({[&] { ++quits; }, [&] { ++breaks; }, [&] { ++helps; }});
  std::vector<std::uint8_t> out;
  filter.filter(bytes_of("ab\x01"), out);
  filter.filter(bytes_of("xc\x01\x01"), out);
  filter.filter(bytes_of("\x01"
                         "b\x01"
                         "h\x01zd"),
                out);
  EXPECT_EQ(std::string(out.begin(), out.end()),
            "abc\x01"
            "d");
  EXPECT_EQ(quits, 1);
  EXPECT_EQ(breaks, 1);
  EXPECT_EQ(helps, 1);
  EscapeFilter without({});
  without.filter(bytes_of("\x01x"), out);
}

TEST(RingBackend, KeepsTheLastBytes) {
  RingBackend ring(8);
  EXPECT_EQ(ring.write(bytes_of("0123456789")), 10U);
  EXPECT_EQ(ring.take(3), "234");
  EXPECT_EQ(ring.take(100), "56789");
  ring.write(bytes_of("abcdef"));
  ring.write(bytes_of("ghij"));
  EXPECT_EQ(ring.take(100), "cdefghij");
  EXPECT_EQ(ring.take(100), "");
}

TEST_F(CharTest, NullTakesEverything) {
  create({.kind = CharKind::kNull});
  EXPECT_EQ(backend_->write(bytes_of(std::string(1 << 20, 'x'))), 1U << 20);
  EXPECT_FALSE(backend_->is_connected());
}

TEST_F(CharTest, FileIsTruncatedOrAppendedTo) {
  const std::string path = dir_ + "/log";
  const auto contents = [&] {
    std::ifstream in(path);
    return std::string(std::istreambuf_iterator<char>(in), {});
  };
  std::ofstream(path) << "before";
  create({.kind = CharKind::kFile, .path = path});
  backend_->write(bytes_of("one"));
  run_until([&] { return contents() == "one"; });
  backend_.reset();
  create({.kind = CharKind::kFile, .path = path, .append = true});
  backend_->write(bytes_of("two"));
  backend_.reset();
  EXPECT_EQ(contents(), "onetwo") << "written when the back end goes at the latest";
  EXPECT_NE(error_of({.kind = CharKind::kFile, .id = "c9", .path = dir_ + "/no/such"}).find("c9"),
            std::string::npos);
  EXPECT_NE(error_of({.kind = CharKind::kFile, .path = dir_}).find(dir_), std::string::npos) << "a directory";
}

TEST_F(CharTest, AFullDiskDropsOutputAndGoesOn) {
  create({.kind = CharKind::kFile, .path = "/dev/full"});
  for (int i = 0; i < 100; ++i) {
    backend_->write(bytes_of(std::string(4096, 'x')));
    loop_->run_once(0);
  }
  settle();
  EXPECT_EQ(backend_->write(bytes_of("y")), 1U);
}

TEST_F(CharTest, SocketServerPassesBytesBothWays) {
  create(server());
  EXPECT_EQ(backend_->description(), "unix:" + socket_path());
  EXPECT_FALSE(backend_->is_connected());
  EXPECT_EQ(backend_->write(bytes_of("nobody hears this")), 17U);
  const UniqueFd client = connect_to(socket_path());
  run_until([&] { return backend_->is_connected(); });
  EXPECT_EQ(receiver_.connects, 1);
  send_all(client.get(), "to the guest");
  run_until([&] { return receiver_.text() == "to the guest"; });
  EXPECT_EQ(backend_->write(bytes_of("to the host")), 11U);
  EXPECT_EQ(read_some(client.get(), 11), "to the host");
}

TEST_F(CharTest, InputWaitsUntilThereIsRoom) {
  create(server());
  receiver_.room = 4;
  const UniqueFd client = connect_to(socket_path());
  send_all(client.get(), "0123456789");
  run_until([&] { return receiver_.text() == "0123"; });
  settle();
  EXPECT_EQ(receiver_.text(), "0123");
  receiver_.room = 3;
  backend_->resume_input();
  run_until([&] { return receiver_.text() == "0123456"; });
  receiver_.room = 100;
  backend_->resume_input();
  run_until([&] { return receiver_.text() == "0123456789"; });
  EXPECT_FALSE(receiver_.overfed);
}

TEST_F(CharTest, ASlowReaderFillsTheBufferAndIsToldOfRoomLater) {
  create(server());
  const UniqueFd client = connect_to(socket_path());
  run_until([&] { return backend_->is_connected(); });
  const std::string chunk(10'000, 'z');
  std::size_t sent = 0;
  for (int i = 0; i < 1000; ++i) {
    const std::size_t taken = backend_->write(bytes_of(chunk));
    sent += taken;
    loop_->run_once(0);
    if (taken < chunk.size()) {
      settle();
      if (receiver_.writables == 0) {
        break;
      }
      receiver_.writables = 0;
    }
  }
  EXPECT_EQ(receiver_.writables, 0);
  EXPECT_EQ(backend_->write(bytes_of(chunk)), 0U) << "full, and bounded";
  EXPECT_LT(sent, 4U << 20);
  const std::string got = read_some(client.get(), sent);
  EXPECT_EQ(got.size(), sent);
  EXPECT_EQ(receiver_.writables, 1) << "told once";
}

TEST_F(CharTest, WhatThePeerSentBeforeItWentIsDelivered) {
  create(server());
  receiver_.room = 2;
  {
    const UniqueFd client = connect_to(socket_path());
    send_all(client.get(), "last words");
  }
  run_until([&] { return receiver_.text() == "la"; });
  const auto before = std::chrono::steady_clock::now();
  settle();
  EXPECT_GT(std::chrono::steady_clock::now() - before, std::chrono::milliseconds(5))
      << "the loop does not spin";
  receiver_.room = 100;
  backend_->resume_input();
  run_until([&] { return receiver_.disconnects == 1; });
  EXPECT_EQ(receiver_.text(), "last words");
}

TEST_F(CharTest, APeerThatDiesInTheMiddleOfAWriteLeavesNoTrace) {
  create(server());
  {
    const UniqueFd client = connect_to(socket_path());
    run_until([&] { return backend_->is_connected(); });
    while (backend_->write(bytes_of(std::string(50'000, 'x'))) == 50'000) {
      loop_->run_once(0);
    }
    EXPECT_EQ(receiver_.disconnects, 0);
  }
  run_until([&] { return receiver_.disconnects == 1; });
  EXPECT_EQ(receiver_.writables, 1) << "whoever waited for room may go on";
  EXPECT_FALSE(backend_->is_connected());
  EXPECT_EQ(backend_->write(bytes_of("dropped")), 7U);
  const UniqueFd next = connect_to(socket_path());
  run_until([&] { return backend_->is_connected(); });
  backend_->write(bytes_of("fresh"));
  EXPECT_EQ(read_some(next.get(), 5), "fresh") << "nothing of what was meant for the first";
}

TEST_F(CharTest, ASecondClientWaitsForTheFirstToGo) {
  create(server());
  auto first = std::make_unique<UniqueFd>(connect_to(socket_path()));
  run_until([&] { return backend_->is_connected(); });
  const UniqueFd second = connect_to(socket_path());
  send_all(second.get(), "second");
  settle();
  EXPECT_EQ(receiver_.text(), "");
  first.reset();
  run_until([&] { return receiver_.text() == "second"; });
  EXPECT_EQ(receiver_.connects, 2);
}

TEST_F(CharTest, APeerThatWentWhileNobodyReceivesMakesRoomForTheNext) {
  create(server());
  backend_->set_receiver(nullptr);
  {
    const UniqueFd client = connect_to(socket_path());
    send_all(client.get(), "lost");
    run_until([&] { return backend_->is_connected(); });
  }
  run_until([&] { return !backend_->is_connected(); });
  const UniqueFd next = connect_to(socket_path());
  run_until([&] { return backend_->is_connected(); });
}

TEST_F(CharTest, AReceiverCanBeReplacedWhileBytesArrive) {
  create(server());
  backend_->set_receiver(nullptr);
  const UniqueFd client = connect_to(socket_path());
  std::atomic<bool> stop = false;
  std::thread runner([&] {
    while (!stop) {
      loop_->run_once(1);
    }
  });
  std::string all;
  std::array<RecordingReceiver, 2> receivers;
  for (int i = 0; i < 200; ++i) {
    const std::string text = std::to_string(i) + ",";
    all += text;
    send_all(client.get(), text);
    backend_->set_receiver(nullptr);
    const std::string before = receivers[0].text() + receivers[1].text();
    std::this_thread::yield();
    EXPECT_EQ(receivers[0].text() + receivers[1].text(), before) << "not called any more";
    backend_->set_receiver(&receivers[static_cast<std::size_t>(i) % 2]);
  }
  for (int i = 0; i < 500 && receivers[0].text().size() + receivers[1].text().size() < all.size(); ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  backend_->set_receiver(nullptr);
  stop = true;
  runner.join();
  EXPECT_EQ(receivers[0].text().size() + receivers[1].text().size(), all.size())
      << "nothing lost, nothing twice";
}

TEST_F(CharTest, WritersOnOtherThreadsLoseNothing) {
  create(server());
  const UniqueFd client = connect_to(socket_path());
  run_until([&] { return backend_->is_connected(); });
  std::vector<std::thread> writers;
  constexpr std::size_t kEach = 20'000;
  for (int i = 0; i < 2; ++i) {
    writers.emplace_back([&] {
      for (std::size_t done = 0; done < kEach;) {
        const std::size_t taken = backend_->write(bytes_of("x"));
        done += taken;
        if (taken == 0) {
          std::this_thread::yield();
        }
      }
    });
  }
  EXPECT_EQ(read_some(client.get(), 2 * kEach).size(), 2 * kEach);
  for (std::thread& writer : writers) {
    writer.join();
  }
}

TEST_F(CharTest, TheSocketFileGoesWithTheBackend) {
  create(server());
  EXPECT_TRUE(std::filesystem::exists(socket_path()));
  backend_.reset();
  EXPECT_FALSE(std::filesystem::exists(socket_path()));
}

TEST_F(CharTest, ASocketFileThatIsSomebodyElsesByNowStays) {
  create(server());
  std::filesystem::remove(socket_path());
  std::ofstream(socket_path()) << "other";
  backend_.reset();
  EXPECT_TRUE(std::filesystem::exists(socket_path()));
}

TEST_F(CharTest, ABusySocketIsRefusedAndADeadOneReplaced) {
  create(server());
  EXPECT_NE(error_of(server()).find("in use"), std::string::npos);
  EXPECT_TRUE(std::filesystem::exists(socket_path()));
  backend_.reset();
  {
    const UniqueFd dead(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    const std::string path = socket_path();
    std::copy(path.begin(), path.end(), address.sun_path);
    ASSERT_EQ(::bind(dead.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
  }
  create(server());
  const UniqueFd client = connect_to(socket_path());
  run_until([&] { return backend_->is_connected(); });
}

TEST_F(CharTest, SocketErrorsNameWhatIsWrong) {
  std::ofstream(socket_path()) << "a file";
  EXPECT_NE(error_of(server()).find("no socket"), std::string::npos);
  EXPECT_EQ(std::filesystem::file_size(socket_path()), 6U) << "left alone";
  CharConfig config = server();
  config.path = std::string(200, 'x');
  EXPECT_NE(error_of(config).find("longer"), std::string::npos);
  config = server();
  config.server = false;
  config.path = dir_ + "/absent";
  EXPECT_NE(error_of(config).find("cannot connect"), std::string::npos);
  EXPECT_NE(error_of({.kind = CharKind::kSocket, .id = "c1"}).find("path= or port="), std::string::npos);
  EXPECT_NE(error_of({.kind = CharKind::kSocket, .host = "no such host!", .port = 5}).find("resolve"),
            std::string::npos);
  EXPECT_NE(error_of({.kind = CharKind::kSocket, .fd = 100'000}).find("no socket"), std::string::npos);
}

TEST_F(CharTest, ClientAndServerOverTcp) {
  create({.kind = CharKind::kSocket, .port = 0, .server = true, .wait = false});
  const std::string description = backend_->description();
  ASSERT_EQ(description.substr(0, 14), "tcp:127.0.0.1:");
  const auto port = static_cast<std::uint16_t>(std::stoi(description.substr(14)));
  RecordingReceiver other_receiver;
  auto other = *create_char_backend({.kind = CharKind::kSocket, .port = port}, *loop_, log_);
  other->set_receiver(&other_receiver);
  EXPECT_TRUE(other->is_connected());
  other->write(bytes_of("ping"));
  run_until([&] { return receiver_.text() == "ping"; });
  backend_->write(bytes_of("pong"));
  run_until([&] { return other_receiver.text() == "pong"; });
  EXPECT_NE(error_of({.kind = CharKind::kSocket, .port = port, .server = true, .wait = false})
                .find("cannot listen"),
            std::string::npos);
  backend_.reset();
  run_until([&] { return other_receiver.disconnects == 1; });
  EXPECT_NE(error_of({.kind = CharKind::kSocket, .port = port}).find("refused"), std::string::npos);
}

TEST_F(CharTest, AConnectedSocketByDescriptor) {
  int fds[2];
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
  const UniqueFd peer(fds[1]);
  create({.kind = CharKind::kSocket, .fd = fds[0]});
  send_all(peer.get(), "hello");
  run_until([&] { return receiver_.text() == "hello"; });
}

TEST_F(CharTest, AServerThatWaitsComesUpWithItsFirstClient) {
  CharConfig config = server();
  config.wait = true;
  UniqueFd client;
  std::thread connector([&] {
    for (int i = 0; i < 500 && !std::filesystem::exists(socket_path()); ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    client = connect_to(socket_path());
  });
  create(config);
  connector.join();
  run_until([&] { return backend_->is_connected(); });
}

TEST_F(CharTest, WhatEndsTheLoopEndsTheWaitForAClient) {
  CharConfig config = server();
  config.wait = true;
  loop_->post([this] { loop_->stop(); });  // as a signal does
  create(config);
  EXPECT_FALSE(backend_->is_connected());
}

// A listening socket stays ready while nobody can be accepted.
TEST_F(CharTest, WithoutDescriptorsAClientWaitsAndTheLoopDoesNotSpin) {
  create(server());
  settle();
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &before), 0);
  const UniqueFd client = connect_to(socket_path());
  const rlimit none{.rlim_cur = 3, .rlim_max = before.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &none), 0);
  const auto start = std::chrono::steady_clock::now();
  int turns = 0;
  while (std::chrono::steady_clock::now() - start < std::chrono::milliseconds(50)) {
    loop_->run_once(10);
    ++turns;
  }
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &before), 0);
  EXPECT_LT(turns, 20);
  run_until([&] { return backend_->is_connected(); });
}

TEST_F(CharTest, OutputGathersIntoFewWrites) {
  int fds[2];
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, fds), 0);  // keeps the edges of writes
  const UniqueFd peer(fds[1]);
  create({.kind = CharKind::kSocket, .fd = fds[0]});
  settle();
  for (int i = 0; i < 100; ++i) {
    backend_->write(bytes_of("x"));
  }
  std::array<char, 200> buffer;
  ssize_t largest = 0;
  run_until([&] {
    largest = std::max(largest, ::recv(peer.get(), buffer.data(), buffer.size(), MSG_DONTWAIT));
    return largest > 10;
  });
}

TEST_F(CharTest, PtyPeersComeAndGo) {
  create({.kind = CharKind::kPty, .id = "p"});
  const std::string description = backend_->description();
  ASSERT_EQ(description.substr(0, 13), "pty:/dev/pts/");
  const std::string path = description.substr(4);
  settle();
  EXPECT_FALSE(backend_->is_connected());
  EXPECT_EQ(backend_->write(bytes_of("nobody")), 6U);
  for (int round = 1; round <= 3; ++round) {
    UniqueFd slave(::open(path.c_str(), O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK));
    ASSERT_TRUE(slave.valid());
    run_until([&] { return backend_->is_connected(); });
    send_all(slave.get(), "in\n");
    backend_->write(bytes_of("out\n"));
    EXPECT_EQ(read_some(slave.get(), 4), "out\n") << "raw: not a byte more";
    run_until([&] { return receiver_.text().size() == 3 * static_cast<std::size_t>(round); });
    EXPECT_EQ(receiver_.connects, round);
    slave.reset();
    run_until([&] { return receiver_.disconnects == round; });
  }
  const auto before = std::chrono::steady_clock::now();
  settle();
  EXPECT_GT(std::chrono::steady_clock::now() - before, std::chrono::milliseconds(10))
      << "hung up does not spin";
}

TEST_F(CharTest, AnOpenerOfThePtyThatWritesAndGoesIsHeard) {
  create({.kind = CharKind::kPty});
  settle();
  {
    const UniqueFd slave(::open(backend_->description().substr(4).c_str(), O_RDWR | O_NOCTTY | O_CLOEXEC));
    send_all(slave.get(), "echo");
  }
  run_until([&] { return receiver_.text() == "echo"; });
  run_until([&] { return receiver_.disconnects == receiver_.connects; });
}

TEST_F(CharTest, WhatIsWrittenToAPtyThatNobodyReadsDoesNotKeepTheLoopBusy) {
  create({.kind = CharKind::kPty});
  backend_->set_receiver(nullptr);
  const std::string path = backend_->description().substr(4);
  {
    const UniqueFd slave(::open(path.c_str(), O_RDWR | O_NOCTTY | O_CLOEXEC));
    settle();
    send_all(slave.get(), "into the void");
  }
  settle();
  const auto start = std::chrono::steady_clock::now();
  int turns = 0;
  while (std::chrono::steady_clock::now() - start < std::chrono::milliseconds(50)) {
    loop_->run_once(10);
    ++turns;
  }
  EXPECT_LT(turns, 20);
}

TEST_F(CharTest, PtySizeIsKnown) {
  create({.kind = CharKind::kPty});
  const UniqueFd slave(::open(backend_->description().substr(4).c_str(), O_RDWR | O_NOCTTY | O_CLOEXEC));
  const winsize size{.ws_row = 33, .ws_col = 111, .ws_xpixel = 0, .ws_ypixel = 0};
  ASSERT_EQ(::ioctl(slave.get(), TIOCSWINSZ, &size), 0);
  EXPECT_EQ(backend_->size(), (std::pair<std::uint16_t, std::uint16_t>{111, 33}));
  backend_->refresh_size();
  run_until([&] { return receiver_.size.first == 111; });
  EXPECT_EQ(receiver_.size.second, 33);
}

// Standard input and output by a pseudo-terminal or by pipes.
class StdioTest : public CharTest {
 protected:
  void create_on(int in, int out, bool escape = false) {
    auto made = StdioBackend::create(
        {.kind = CharKind::kStdio, .escape = escape, .on_quit = [this] { ++quits_; }}, in, out, *loop_, log_);
    ASSERT_TRUE(made.has_value()) << made.error().message;
    backend_ = *std::move(made);
    backend_->set_receiver(&receiver_);
  }
  int quits_ = 0;
};

TEST_F(StdioTest, PipesEndOfFileAndABrokenOutput) {
  int in[2];
  int out[2];
  ASSERT_EQ(::pipe2(in, O_CLOEXEC), 0);
  ASSERT_EQ(::pipe2(out, O_CLOEXEC), 0);
  const UniqueFd stdin_end(in[0]);
  UniqueFd stdin_source(in[1]);
  const UniqueFd stdout_end(out[1]);
  UniqueFd stdout_sink(out[0]);
  create_on(stdin_end.get(), stdout_end.get());
  send_all(stdin_source.get(), "typed");
  stdin_source.reset();
  run_until([&] { return receiver_.text() == "typed"; });
  backend_->write(bytes_of("printed"));
  EXPECT_EQ(read_some(stdout_sink.get(), 7), "printed");
  EXPECT_TRUE(backend_->is_connected()) << "the end of the input is not the end";
  EXPECT_EQ(::fcntl(stdin_end.get(), F_GETFL) & O_NONBLOCK, 0) << "the shared open file is left alone";
  EXPECT_EQ(::fcntl(stdout_end.get(), F_GETFL) & O_NONBLOCK, 0);
  stdout_sink.reset();
  for (int i = 0; i < 10; ++i) {
    EXPECT_EQ(backend_->write(bytes_of("into the void")), 13U);
    settle();
  }
}

TEST_F(StdioTest, AFileAndTheNullDeviceAsInput) {
  const std::string path = dir_ + "/script";
  std::ofstream(path) << std::string(100'000, 's');
  const UniqueFd file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  const UniqueFd null(::open("/dev/null", O_RDWR | O_CLOEXEC));
  receiver_.room = 1000;
  create_on(file.get(), null.get());
  run_until([&] { return receiver_.text().size() == 1000; });
  settle();
  EXPECT_EQ(receiver_.text().size(), 1000U);
  receiver_.room = SIZE_MAX;
  backend_->resume_input();
  run_until([&] { return receiver_.text().size() == 100'000; });
  backend_.reset();
  create_on(null.get(), null.get());
  backend_->write(bytes_of("x"));
  settle();
}

TEST_F(StdioTest, AFileAsOutputLosesNothingOfAGuestThatNeverPauses) {
  const std::string path = dir_ + "/output";
  const UniqueFd file(::open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600));
  const UniqueFd null(::open("/dev/null", O_RDWR | O_CLOEXEC));
  create_on(null.get(), file.get());
  std::atomic<bool> stop = false;
  std::size_t sent = 0;
  std::thread guest([&] {
    while (!stop.load()) {
      sent += backend_->write(bytes_of("x"));
    }
  });
  // Each turn of the loop ends although bytes come all the time.
  for (int i = 0; i < 300; ++i) {
    loop_->run_once(10);
  }
  stop.store(true);
  guest.join();
  EXPECT_GT(sent, 0U);
  run_until([&] { return std::filesystem::file_size(path) == sent; });
}

TEST_F(StdioTest, SocketsGetTheirFlagsBack) {
  int fds[2];
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
  const UniqueFd ours(fds[0]);
  const UniqueFd peer(fds[1]);
  create_on(ours.get(), ours.get());
  backend_->write(bytes_of("out"));
  EXPECT_EQ(read_some(peer.get(), 3), "out");
  backend_.reset();
  EXPECT_EQ(::fcntl(ours.get(), F_GETFL) & O_NONBLOCK, 0);
}

TEST_F(StdioTest, EscapeKeyQuitsBreaksAndHelps) {
  int fds[2];
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
  const UniqueFd ours(fds[0]);
  const UniqueFd peer(fds[1]);
  create_on(ours.get(), ours.get(), true);
  send_all(peer.get(),
           "a\x01\x01\x01"
           "b\x01h\x01xz");
  run_until([&] { return quits_ == 1; });
  run_until([&] { return receiver_.text() == "a\x01z"; });
  EXPECT_EQ(receiver_.breaks, 1);
  EXPECT_NE(read_some(peer.get(), 50).find("control-A x"), std::string::npos);
}

TEST_F(StdioTest, WithoutEscapeTheKeyIsAKeyLikeAnyOther) {
  int fds[2];
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
  const UniqueFd ours(fds[0]);
  const UniqueFd peer(fds[1]);
  create_on(ours.get(), ours.get());
  send_all(peer.get(), "\x01x");
  run_until([&] { return receiver_.text() == "\x01x"; });
  EXPECT_EQ(quits_, 0);
}

// In a child process, which makes the pseudo-terminal its own: the mode is changed in the foreground only.
int terminal_child(int slave, bool escape) {
  if (::setsid() < 0 || ::ioctl(slave, TIOCSCTTY, 0) != 0) {
    return 10;
  }
  auto loop = *EventLoop::create();
  Log log(-1);
  termios before{};
  ::tcgetattr(slave, &before);
  {
    auto backend =
        StdioBackend::create({.kind = CharKind::kStdio, .escape = escape}, slave, slave, *loop, log);
    termios during{};
    ::tcgetattr(slave, &during);
    if (!backend.has_value() || (during.c_lflag & (ICANON | ECHO)) != 0 || (during.c_oflag & OPOST) == 0) {
      return 11;
    }
    if (((during.c_lflag & ISIG) != 0) == escape) {
      return 12;
    }
    restore_terminal();
    termios restored{};
    ::tcgetattr(slave, &restored);
    if (restored.c_lflag != before.c_lflag) {
      return 13;
    }
  }
  {
    const auto again =
        StdioBackend::create({.kind = CharKind::kStdio, .escape = escape}, slave, slave, *loop, log);
  }
  termios after{};
  ::tcgetattr(slave, &after);
  return after.c_lflag == before.c_lflag && after.c_iflag == before.c_iflag ? 0 : 14;
}

TEST_F(StdioTest, ATerminalIsRawMeanwhileAndThenAsItWas) {
  for (const bool escape : {false, true}) {
    int master = -1;
    int slave = -1;
    ASSERT_EQ(::openpty(&master, &slave, nullptr, nullptr, nullptr), 0);
    const UniqueFd master_fd(master);
    const UniqueFd slave_fd(slave);
    const pid_t child = ::fork();
    if (child == 0) {
      ::_exit(terminal_child(slave, escape));
    }
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    EXPECT_EQ(WEXITSTATUS(status), 0);
  }
}

TEST_F(StdioTest, AClosedDescriptorIsAnError) {
  auto made = StdioBackend::create({.kind = CharKind::kStdio, .id = "s"}, 987'654, 1, *loop_, log_);
  ASSERT_FALSE(made.has_value());
  EXPECT_NE(made.error().message.find("standard input"), std::string::npos);
}

}  // namespace
}  // namespace wisp
