#include "bindings/torch_transport.h"

#include <pybind11/chrono.h>

#include <algorithm>
#include <utility>

#include "core/error.h"

namespace duplex {
namespace {

// Of the two kinds of message in a channel.
constexpr int kCommand = 0;
constexpr int kMeeting = 1;
// Commands that may be on their way at once, to all workers together, before the oldest is waited
// for. Small ones are many when a session closes; large ones are pieces of a session's blocks.
constexpr std::size_t kMostSent = 512;
constexpr std::size_t kMostSentBytes = std::size_t{4} << 20;

void wait(const py::object& work, std::chrono::milliseconds time_out) {
  work.attr("wait")(py::cast(time_out));
}

// What gloo said, without the place in its source before it and the advice behind it.
std::string reason_of(const py::error_already_set& error) {
  std::string text = error.what();
  text = text.substr(0, std::min(text.find('\n'), text.find(". This is")));
  const std::size_t place = text.find(".cc:");
  const std::size_t end = text.find("] ", place == std::string::npos ? text.size() : place);
  return end == std::string::npos ? text : text.substr(end + 2);
}

}  // namespace

TorchTransport::TorchTransport(const py::module_& torch, int rank, int n_ranks)
    // Keywords that C++ hands over would be looked at in a way that lets a signal's handler run.
    : as_bytes_(
          py::module_::import("functools")
              .attr("partial")(torch.attr("frombuffer"), py::arg("dtype") = torch.attr("uint8"))),
      rank_(rank),
      n_ranks_(n_ranks) {}

TorchTransport::~TorchTransport() {
  const py::gil_scoped_acquire acquire;
  close();
  as_bytes_.release().dec_ref();
}

void TorchTransport::connect(const std::vector<py::object>& groups, GiveUp give_up) {
  give_up_ = std::move(give_up);
  for (const py::object& group : groups)
    channels_.push_back({group.attr("send"), group.attr("recv"), {}, 0});
}

void TorchTransport::close() {
  channels_.clear();
  give_up_ = py::object();
}

TorchTransport::Channel& TorchTransport::channel(int i) {
  check<RankFailed>(static_cast<std::size_t>(i) < channels_.size(),
                    "transport: it is closed, or was not connected");
  return channels_[static_cast<std::size_t>(i)];
}

py::list TorchTransport::tensors(py::object buffer) const {
  py::list list;
  list.append(as_bytes_(std::move(buffer)));
  return list;
}

py::list TorchTransport::tensors(std::span<std::byte> bytes) const {
  return tensors(py::memoryview::from_memory(bytes.data(), static_cast<py::ssize_t>(bytes.size())));
}

std::optional<Transport::Lost> TorchTransport::send(int channel, std::span<const std::byte> command,
                                                    std::chrono::milliseconds time_out) {
  const py::gil_scoped_acquire acquire;
  Channel& here = this->channel(channel);
  int other = rank_;
  try {
    while (here.sent.size() > kMostSent || here.sent_bytes > kMostSentBytes) {
      const Message oldest = std::move(here.sent.front());
      here.sent.pop_front();
      here.sent_bytes -= oldest.n_bytes;
      other = oldest.rank;
      wait(oldest.work, time_out);
    }
    const py::list copy =
        tensors(py::bytearray(reinterpret_cast<const char*>(command.data()), command.size()));
    for (other = 1; other < n_ranks_; ++other) {
      here.sent.push_back({other, command.size(), here.send(copy, other, kCommand)});
      here.sent_bytes += command.size();
    }
  } catch (const py::error_already_set& error) {
    return Lost{other, reason_of(error)};
  }
  return std::nullopt;
}

std::optional<Transport::Lost> TorchTransport::receive(int channel, std::span<std::byte> command) {
  const py::gil_scoped_acquire acquire;
  try {
    wait(this->channel(channel).receive(tensors(command), 0, kCommand), kForever);
  } catch (const py::error_already_set& error) {
    return Lost{0, reason_of(error)};
  }
  return std::nullopt;
}

std::optional<Transport::Lost> TorchTransport::exchange(int channel,
                                                        std::span<const std::span<std::byte>> slabs,
                                                        std::chrono::milliseconds time_out) {
  const py::gil_scoped_acquire acquire;
  const Channel& here = this->channel(channel);
  std::vector<std::pair<int, py::object>> messages;
  int other = rank_;
  try {
    for (other = 0; other < n_ranks_; ++other)
      if (other != rank_)
        messages.emplace_back(
            other, here.receive(tensors(slabs[static_cast<std::size_t>(other)]), other, kMeeting));
    const py::list mine = tensors(slabs[static_cast<std::size_t>(rank_)]);
    for (other = 0; other < n_ranks_; ++other)
      if (other != rank_) messages.emplace_back(other, here.send(mine, other, kMeeting));
    for (const auto& [rank, work] : messages) {
      other = rank;
      wait(work, time_out);
    }
  } catch (const py::error_already_set& error) {
    return Lost{other, reason_of(error)};
  }
  return std::nullopt;
}

void TorchTransport::give_up(int rank, std::string_view reason) noexcept {
  const py::gil_scoped_acquire acquire;
  try {
    const py::object give_up = give_up_;
    if (give_up) give_up(rank, std::string(reason));
  } catch (py::error_already_set& error) {
    error.discard_as_unraisable("TorchTransport.give_up");
  }
}

void bind_transport(py::module_& m) {
  py::class_<TorchTransport, std::shared_ptr<TorchTransport>>(
      m, "TorchTransport", "Ranks that share no memory, by process groups of torch.distributed.")
      .def(py::init<py::module_, int, int>(), py::arg("torch"), py::kw_only(), py::arg("rank"),
           py::arg("n_ranks"))
      .def("connect", &TorchTransport::connect, py::arg("groups"), py::arg("give_up"),
           "groups: a ProcessGroupGloo for each channel. give_up(rank, reason): the group is over.")
      .def(
          "exchange",
          [](TorchTransport& transport, int channel, std::vector<py::array> slabs) {
            std::vector<std::span<std::byte>> spans;
            for (py::array& slab : slabs)
              spans.emplace_back(static_cast<std::byte*>(slab.mutable_data()),
                                 static_cast<std::size_t>(slab.nbytes()));
            const ReleaseGil release;
            const auto lost = transport.exchange(channel, spans, Transport::kForever);
            check<RankFailed>(!lost, "transport: ", lost ? lost->reason : "");
          },
          py::arg("channel"), py::arg("slabs"), "One meeting, for measurements.")
      .def("close", &TorchTransport::close, "Lets go of them. No call may be in progress.");
}

}  // namespace duplex
