// A Transport over the process groups of torch.distributed, called as objects of Python: this
// package is built without torch.
#pragma once

#include <deque>
#include <memory>
#include <vector>

#include "bindings/bindings.h"
#include "parallel/transport.h"

namespace duplex {

// Calls go from C++ straight into functions of torch that are C++ again, and torch releases the GIL
// while it waits. No line of Python runs in between, so that a signal's handler (Ctrl-C) never
// breaks a meeting off.
class TorchTransport final : public Transport {
 public:
  TorchTransport(const py::module_& torch, int rank, int n_ranks);
  ~TorchTransport() override;

  // groups: one for each channel, as of torch.distributed.ProcessGroupGloo. give_up(rank, reason):
  // called once, when the group is over.
  using GiveUp = py::typing::Callable<void(py::int_, py::str)>;
  void connect(const std::vector<py::object>& groups, GiveUp give_up);
  // Lets go of every object of Python. No call may be in progress.
  void close();

  std::string name() const override { return "torch.distributed"; }
  std::optional<Lost> send(int channel, std::span<const std::byte> command,
                           std::chrono::milliseconds time_out) override;
  std::optional<Lost> receive(int channel, std::span<std::byte> command) override;
  std::optional<Lost> exchange(int channel, std::span<const std::span<std::byte>> slabs,
                               std::chrono::milliseconds time_out) override;
  void give_up(int rank, std::string_view reason) noexcept override;

 private:
  // A message on its way to or from another rank.
  struct Message {
    int rank;
    std::size_t n_bytes;
    py::object work;
  };
  struct Channel {
    py::object send, receive;  // of its process group
    std::deque<Message> sent;  // commands, some of which may not have been taken yet
    std::size_t sent_bytes = 0;
  };
  Channel& channel(int i);
  py::list tensors(py::object buffer) const;
  py::list tensors(std::span<std::byte> bytes) const;

  py::object as_bytes_;  // a buffer as a tensor
  int rank_;
  int n_ranks_;
  py::object give_up_;
  std::deque<Channel> channels_;
};

}  // namespace duplex
