#include "parallel/group_rendezvous.h"

#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <utility>

#include "core/error.h"
#include "parallel/waiting.h"

namespace duplex {
namespace {

constexpr int kLookMs = 20;  // how often a wait for a descriptor looks whether the group is over

// One byte, and with it a descriptor or room for one.
struct Message {
  Message() {
    header.msg_iov = &part;
    header.msg_iovlen = 1;
    header.msg_control = control;
    header.msg_controllen = sizeof control;
  }
  char byte = 0;
  iovec part{&byte, 1};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr header{};
};

}  // namespace

RankSockets::RankSockets(int n_ranks) {
  for (int rank = 1; rank < n_ranks; ++rank) {
    int ends[2];
    if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0)
      fail_system(errno, "tensor_parallel: cannot make a pair of sockets");
    pairs_.push_back({ends[0], ends[1]});
  }
}

RankSockets::~RankSockets() {
  for (const Pair& pair : pairs_) {
    ::close(pair.leader);
    ::close(pair.worker);
  }
}

GroupRendezvous::GroupRendezvous(Group group, SlabExchange& words, std::vector<int> sockets)
    : group_(std::move(group)), words_(words), sockets_(std::move(sockets)) {}

std::vector<std::string> GroupRendezvous::all_gather(const std::string& mine) {
  const std::uint64_t n_bytes = mine.size();
  check(sizeof n_bytes + n_bytes <= words_.slab_bytes(), "rendezvous: expected at most ",
        words_.slab_bytes() - sizeof n_bytes, " bytes, found ", n_bytes);
  auto* const slab = static_cast<char*>(words_.mine());
  std::memcpy(slab, &n_bytes, sizeof n_bytes);
  std::memcpy(slab + sizeof n_bytes, mine.data(), mine.size());
  std::vector<std::string> all;
  for (const void* theirs : words_.meet(words_.slab_bytes())) {
    std::uint64_t n = 0;
    std::memcpy(&n, theirs, sizeof n);
    all.emplace_back(static_cast<const char*>(theirs) + sizeof n, n);
  }
  return all;
}

int GroupRendezvous::share_descriptor(int from, int descriptor) {
  const bool is_mine = rank() == from;
  if (rank() > 0) {
    if (!is_mine) return receive(0);
    send(0, descriptor);
    return descriptor;
  }
  if (!is_mine) descriptor = receive(from);
  for (int to = 1; to < size(); ++to)
    if (to != from) send(to, descriptor);
  return descriptor;
}

int GroupRendezvous::socket_of(int rank) const {
  return sockets_.at(static_cast<std::size_t>(rank == 0 ? 0 : rank - 1));
}

void GroupRendezvous::send(int to, int descriptor) const {
  Message message;
  cmsghdr* const head = CMSG_FIRSTHDR(&message.header);
  head->cmsg_level = SOL_SOCKET;
  head->cmsg_type = SCM_RIGHTS;
  head->cmsg_len = CMSG_LEN(sizeof descriptor);
  std::memcpy(CMSG_DATA(head), &descriptor, sizeof descriptor);
  if (::sendmsg(socket_of(to), &message.header, MSG_NOSIGNAL) == 1) return;
  group_.fail_and_throw(to, text_of("it took no descriptor: ", std::strerror(errno)));
}

int GroupRendezvous::receive(int from) const {
  const int socket = socket_of(from);
  const auto deadline = WaitClock::now() + group_.time_out();
  for (pollfd look{socket, POLLIN, 0}; ::poll(&look, 1, kLookMs) <= 0;) {
    group_.check_alive();
    // Rank 0 alone looks at the clock: what it waits for, the others wait for behind it.
    if (rank() == 0 && WaitClock::now() > deadline)
      group_.fail_and_throw(from, "it sent no descriptor");
  }
  Message message;
  ssize_t n = 0;
  do n = ::recvmsg(socket, &message.header, MSG_CMSG_CLOEXEC);
  while (n < 0 && errno == EINTR);
  const cmsghdr* const head = n == 1 ? CMSG_FIRSTHDR(&message.header) : nullptr;
  if (head == nullptr || head->cmsg_type != SCM_RIGHTS)
    group_.fail_and_throw(from, "it sent no descriptor");
  int descriptor = -1;
  std::memcpy(&descriptor, CMSG_DATA(head), sizeof descriptor);
  return descriptor;
}

}  // namespace duplex
