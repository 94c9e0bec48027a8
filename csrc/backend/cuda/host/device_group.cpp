#include "host/device_group.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <utility>

#include "core/error.h"
#include "host/cuda_backend.h"

namespace duplex::cuda {
namespace {

constexpr std::uint64_t kWaitNs = 60'000'000'000;  // of rank 0; others wait for it without end
constexpr std::chrono::milliseconds kLook{10};     // how often the group is looked at
// Parts of all ranks: beyond so many, two exchanges were faster on one GPU in place of 2 and of 4
// (docs/GPU.md); between GPUs nobody has measured it.
constexpr std::int64_t kOneShotBytes = 256 << 10;
constexpr std::size_t kBytesAskedFor = 16 << 20;  // a third of Hopper's second-level cache

std::int64_t row_words(const ExchangeOptions& options) {
  return round_up(options.width, kColumnAlign) / 4;
}

}  // namespace

DeviceGroup::DeviceGroup(Runtime& runtime, std::shared_ptr<Rendezvous> ranks,
                         const ExchangeOptions& options)
    : ranks_(std::move(ranks)), options_(options), device_(runtime.device()) {
  const int n = ranks_->size();
  check<BackendUnavailable>(n == 2 || n == 4 || n == 8,
                            "tensor_parallel: expected 2, 4 or 8 GPUs, found ", n,
                            "; transport=\"shared memory\" takes any number");
  Runtime::make_current(device_);
  driver_ = create_multicast_driver();
  memory_.emplace(
      *driver_, *ranks_,
      SharedMemoryOptions{device_, kLanes * static_cast<std::size_t>(lane_bytes(buffer_bytes())),
                          options.transport != "p2p"});
  const bool has_multicast = memory_->multicast() != nullptr;
  check<BackendUnavailable>(has_multicast || options.transport != "nvls",
                            "transport: 'nvls' is not there: ", memory_->why_not(),
                            "; take transport=\"p2p\", or leave it out");
  transport_ = has_multicast ? "nvls" : "p2p";
  if (!has_multicast && options.transport == "auto")
    transport_ += " (no nvls: " + memory_->why_not() + ")";
  set_up(runtime);
  watcher_ = std::thread([this] { watch(); });
}

// A fork of the process has no such thread.
DeviceGroup::~DeviceGroup() {
  is_closing_ = true;
  if (owner_.is_here())
    watcher_.join();
  else
    watcher_.detach();
}

// Every kernel has as many thread blocks on every rank.
std::int32_t DeviceGroup::common_blocks(std::int32_t mine) {
  std::int32_t least = kMaxBlocks;
  for (const std::string& theirs : ranks_->all_gather(std::to_string(mine)))
    least = std::min(least, std::atoi(theirs.c_str()));
  return least;
}

void DeviceGroup::set_up(Runtime& runtime) {
  const std::int32_t n_blocks = common_blocks(runtime.resident_blocks());
  const std::int64_t bytes = lane_bytes(buffer_bytes());
  states_.reset(static_cast<GroupState*>(runtime.allocate(kLanes * sizeof(GroupState))));
  reports_.reset(static_cast<WaitReport*>(Runtime::allocate_host(kLanes * sizeof(WaitReport))));
  runtime.synchronize();
  for (int i = 0; i < kLanes; ++i) {
    const std::int64_t at = i * bytes;
    Group& lane = lanes_[i];
    lane.rank = ranks_->rank();
    lane.n_ranks = ranks_->size();
    lane.n_blocks = n_blocks;
    lane.own = memory_->own() + at;
    for (int peer = 0; peer < lane.n_ranks; ++peer) lane.peers[peer] = memory_->peer(peer) + at;
    lane.multicast = memory_->multicast() == nullptr ? nullptr : memory_->multicast() + at;
    lane.buffer_bytes = buffer_bytes();
    lane.state = states_.get() + i;
    lane.report = reports_.get() + i;
    lane.wait_limit_ns = lane.rank == 0 ? kWaitNs : ~std::uint64_t{0};
    const auto begin = static_cast<std::size_t>(at);
    memory_->fill(begin, std::byte{0}, kPadBytes);
    memory_->fill(begin + kPadBytes, std::byte{0xff}, static_cast<std::size_t>(bytes - kPadBytes));
  }
  memory_->meet();  // no rank sends before all are empty
}

Exchanges DeviceGroup::way_for(std::int64_t n_rows) const {
  if (options_.adds_in_switch) return Exchanges::kSwitch;
  const std::int64_t of_all = ranks_->size() * n_rows * row_words(options_) * kWordBytes;
  return of_all <= kOneShotBytes ? Exchanges::kOneShot : Exchanges::kTwoShot;
}

std::size_t DeviceGroup::all_parts_bytes() const {
  if (options_.n_parts == 1) return 0;
  return static_cast<std::size_t>(ranks_->size() * options_.n_parts * options_.part_stride) *
         sizeof(float);
}

// For the most rows of either way to the sum, and of what rank 0 spreads, and one row at least of
// what is gathered, with a word of each rank; where ranks have several parts, one of each at least.
std::int64_t DeviceGroup::buffer_bytes() const {
  std::int64_t bytes =
      std::max(ranks_->size() * options_.gather_stride, options_.max_rows * options_.row_stride) *
          std::int64_t{sizeof(float)} +
      ranks_->size() * kWordBytes;
  if (options_.n_parts > 1)
    return round_up(
        std::max(bytes, static_cast<std::int64_t>(all_parts_bytes()) / options_.n_parts),
        kWordBytes);
  const std::int64_t row_of_all = ranks_->size() * row_words(options_) * kWordBytes;
  for (const std::int64_t n_rows :
       {std::int64_t{options_.max_rows},
        std::clamp(kOneShotBytes / row_of_all, std::int64_t{1}, std::int64_t{options_.max_rows}),
        std::int64_t{1}})
    bytes =
        std::max(bytes, all_reduce_bytes(ranks_->size(), n_rows, options_.width, way_for(n_rows)));
  return round_up(bytes, kWordBytes);
}

void DeviceGroup::check_alive() const {
  for (const Group& lane : lanes_)
    if (lane.report->is_there != 0)
      ranks_->fail(lane.report->peer < 0 ? lane.rank : lane.report->peer, describe(*lane.report));
  ranks_->check_alive();
}

bool DeviceGroup::is_over() const {
  try {
    ranks_->check_alive();
    return false;
  } catch (const std::exception&) {
    return true;
  }
}

void DeviceGroup::watch() {
  while (!is_closing_ && !is_over()) std::this_thread::sleep_for(kLook);
  if (is_closing_) return;
  try {
    Runtime::make_current(device_);
    for (const Group& lane : lanes_)
      memory_->fill(static_cast<std::size_t>(lane.own - memory_->own() + kOverAt), std::byte{1}, 4);
  } catch (const std::exception&) {  // a GPU that a kernel has stopped waits for nobody
  }
}

// ---- a lane

NextWeights DeviceExchange::first_bytes(const PackedMatrix& w) const {
  if (w.data == nullptr) return {};
  const std::size_t bytes = lane_.packed_bytes(w.n_out, w.n_in, w.dtype);
  return {w.data, static_cast<std::int64_t>(std::min(bytes, kBytesAskedFor) / 16 * 16)};
}

DeviceExchange::DeviceExchange(CudaBackend& lane, std::shared_ptr<const DeviceGroup> group,
                               LaneKind kind)
    : lane_(lane),
      group_(std::move(group)),
      args_(group_->lane(kind)),
      slab_(lane.allocate(group_->options().slab_bytes)) {
  if (group_->all_parts_bytes() > 0) all_parts_ = lane.allocate(group_->all_parts_bytes());
}

void DeviceExchange::add(Backend&, const ConvAddNormArgs& args, std::int64_t part_stride,
                         const PackedMatrix& next) {
  if (args.segments.n_rows == 0) return;
  if (args.n_parts > 1) return add_parts(args, part_stride, next);
  lane_.all_reduce({.group = args_,
                    .part = static_cast<const float*>(mine()),
                    .part_stride = args.x_stride,
                    .op = args,
                    .next = first_bytes(next)},
                   group_->way_for(args.segments.n_rows));
}

// Gathers as many parts of each rank at once as the lane has memory for; then every rank adds those
// of all where it convolves. No copies, so that a pass can be recorded.
void DeviceExchange::add_parts(const ConvAddNormArgs& args, std::int64_t part_stride,
                               const PackedMatrix& next) {
  const std::int64_t n_floats = args.segments.n_rows * args.x_stride;  // of a part
  const std::int64_t room = args_.buffer_bytes / std::int64_t{sizeof(float)} / args_.n_ranks;
  const auto at_once =
      static_cast<std::int32_t>(std::max((room - n_floats) / part_stride + 1, std::int64_t{1}));
  ConvAddNormArgs of_all = args;
  of_all.n_parts = args_.n_ranks * args.n_parts;
  auto* all = static_cast<float*>(all_parts_->data());
  for (std::int32_t first = 0; first < args.n_parts; first += at_once) {
    const std::int32_t n = std::min(at_once, args.n_parts - first);
    const std::int64_t share = (n - 1) * part_stride + n_floats;
    launch_all_gather(lane_.stream(),
                      {args_, static_cast<const float*>(mine()) + first * part_stride, all,
                       args_.n_ranks * share / 4, first == 0 ? first_bytes(next) : NextWeights{}});
    for (std::int32_t rank = 0; rank < args_.n_ranks; ++rank)
      for (std::int32_t p = 0; p < n; ++p)
        of_all.parts[rank * args.n_parts + first + p] = all + rank * share + p * part_stride;
    all += args_.n_ranks * share;
  }
  lane_.do_conv_add_norm(of_all);
}

void DeviceExchange::gather(Backend&, const GatherArgs& args) {
  const auto* const slab = static_cast<const float*>(mine());
  GatherSlicesArgs piece{.group = args_,
                         .in = nullptr,
                         .out = nullptr,
                         .n_rows = 0,
                         .stride = args.stride,
                         .out_stride = args.out_stride,
                         .slices = {}};
  std::copy_n(args.slices, args_.n_ranks, piece.slices);
  const std::int32_t most = most_gathered_rows(args_.n_ranks, args_.buffer_bytes, args.stride);
  for (std::int32_t first = 0; first < args.n_rows; first += most) {
    piece.in = slab + first * args.stride;
    if (args.out != nullptr) piece.out = args.out + first * args.out_stride;
    piece.n_rows = std::min(most, args.n_rows - first);
    launch_gather(lane_.stream(), piece);
  }
}

void DeviceExchange::spread_rows(float* rows, std::int64_t n_floats) {
  launch_broadcast(lane_.stream(), {args_, rows, rows, n_floats / 4, {}});
}

}  // namespace duplex::cuda
