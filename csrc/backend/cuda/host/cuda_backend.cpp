#include "host/cuda_backend.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "backend/quantised.h"
#include "core/error.h"
#include "host/cuda_turn.h"
#include "host/shared_pages.h"
#include "kernels/launchers.h"

namespace duplex::cuda {
namespace {

constexpr std::size_t kMaxRecords = 64;  // of passes

class DeviceBuffer final : public Buffer {
 public:
  DeviceBuffer(Runtime& runtime, std::size_t bytes)
      : data_(runtime.allocate(bytes)), bytes_(bytes) {}
  ~DeviceBuffer() override { Runtime::release(data_); }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  void* data() const override { return data_; }
  std::size_t bytes() const override { return bytes_; }

 private:
  void* data_;
  std::size_t bytes_;
};

// The first row with a NaN or infinity, or -1.
std::int64_t first_bad_row(const PackSource& source, std::int32_t n_in) {
  for (std::int64_t row = 0; row < source.n_rows; ++row)
    for (std::int64_t c = 0; c < n_in; ++c)
      if (!std::isfinite(load_element(source.data, source.dtype, row * source.row_stride + c)))
        return row;
  return -1;
}

// The same for NVFP4.
std::int64_t first_bad_coded_row(const PackSource& source, std::int32_t n_in) {
  std::array<std::uint32_t, 128> bad_codes{};  // of each scale, a bit for each size
  for (std::uint32_t scale = 0; scale < 128; ++scale)
    for (std::uint32_t code = 0; code < 8; ++code)
      if (scale == 127 || !std::isfinite(nvfp4_size(code, scale, source.matrix_scale)))
        bad_codes[scale] |= 1u << code;
  const auto* const codes = static_cast<const std::uint8_t*>(source.data);
  const auto* const scales = static_cast<const std::uint8_t*>(source.scales);
  for (std::int64_t row = 0; row < source.n_rows; ++row)
    for (std::int64_t group = 0; group < div_up(n_in, kNvfp4Group); ++group) {
      const std::uint32_t bad = bad_codes[scales[row * source.scale_row_stride + group] & 127u];
      if (bad == 0) continue;
      const std::int64_t begin = group * kNvfp4Group;
      for (std::int64_t c = begin; c < std::min<std::int64_t>(begin + kNvfp4Group, n_in); ++c) {
        const unsigned code = codes[(row * source.row_stride + c) / 2] >> c % 2 * 4 & 7u;
        if ((bad >> code & 1u) != 0) return row;
      }
    }
  return -1;
}

}  // namespace

CudaBackend::CudaBackend(const BackendOptions& options)
    : lanes_(std::make_shared<Lanes>()), runtime_(options.gpu) {
  check(options.isa.empty(), "isa: expected none for device 'cuda', found '", options.isa, "'");
  has_turns();  // a wrong value in the environment is said here, not in the middle of a turn
  lanes_->add(runtime_);
}

CudaBackend::CudaBackend(CudaBackend& interaction)
    : lane_(LaneKind::kBackground),
      lanes_(interaction.lanes_),
      runtime_(interaction.runtime_, LaneKind::kBackground),
      group_(interaction.group_) {
  // What the other lane has made so far, the weights above all, is there for this one.
  lanes_->add(runtime_);
}

CudaBackend::~CudaBackend() { lanes_->remove(runtime_); }

std::unique_ptr<Backend> CudaBackend::background_lane() {
  return std::unique_ptr<Backend>(new CudaBackend(*this));
}

Runtime& CudaBackend::stream() {
  if (group_ == nullptr) give_way();
  return runtime_;
}

void CudaBackend::give_way() {
  if (lane_ == LaneKind::kBackground) lanes_->give_way();
}

template <class Work>
void CudaBackend::wait(const Work& work) {
  if (group_ == nullptr) return work();
  try {
    work();
  } catch (const std::exception&) {
    group_->check_alive();  // that a rank is gone explains what the device says
    throw;
  }
  group_->check_alive();
}

void CudaBackend::finish() {
  wait([&] { runtime_.synchronize(); });
}

void CudaBackend::run_awake(const std::function<void()>& work) {
  if (lane_ == LaneKind::kBackground) return work();
  const Lanes::Pass pass(*lanes_);
  work();
}

std::unique_ptr<Buffer> CudaBackend::allocate(std::size_t bytes) {
  return std::make_unique<DeviceBuffer>(runtime_, bytes);
}

void CudaBackend::write(void* destination, const void* source, std::size_t bytes) {
  runtime_.write(destination, source, bytes);
}

void CudaBackend::read(void* destination, const void* source, std::size_t bytes) {
  wait([&] { runtime_.read(destination, source, bytes); });
}

void CudaBackend::read_rows(void* destination, const Rows& source,
                            std::span<const std::int32_t> rows, std::size_t row_bytes) {
  const std::size_t bytes = rows.size() * row_bytes;
  if (bytes == 0) return;
  if (rows_ == nullptr || rows_->bytes() < bytes) {
    runtime_.synchronize();  // the old buffer may be in use
    replace(rows_, bytes);
  }
  const auto* const wanted =
      static_cast<const std::int32_t*>(runtime_.stage(rows.data(), rows.size_bytes()));
  launch_gather_rows(
      stream(), static_cast<std::int32_t>(rows.size()),
      {static_cast<const std::byte*>(source.data),
       source.stride * static_cast<std::int64_t>(dtype_bytes(source.dtype)), wanted, nullptr,
       static_cast<std::byte*>(rows_->data()), static_cast<std::int64_t>(row_bytes)});
  wait([&] { runtime_.read(destination, rows_->data(), bytes); });
}

std::unique_ptr<PageMemory> CudaBackend::create_page_memory(std::size_t page_bytes,
                                                            std::int64_t n_pages) {
  return std::make_unique<SharedPages>(lanes_, runtime_, page_bytes, n_pages);
}

std::size_t CudaBackend::packed_bytes(std::int64_t n_out, std::int64_t n_in_padded,
                                      DType dtype) const {
  return packed_matrix_bytes(n_out, n_in_padded, dtype);
}

std::int64_t CudaBackend::pack(const PackSource& source, const PackShape& shape,
                               std::int64_t first_out, void* destination) {
  const bool is_coded = source.dtype == DType::kNvfp4;
  check(is_coded == (shape.dtype == DType::kNvfp4),
        "weights: expected NVFP4 codes for a matrix in nvfp4, and for no other, found ",
        dtype_name(source.dtype), " for ", dtype_name(shape.dtype));
  const std::int64_t bad =
      is_coded ? first_bad_coded_row(source, shape.n_in) : first_bad_row(source, shape.n_in);
  if (bad >= 0 || source.n_rows == 0) return bad;
  const auto elements =
      static_cast<std::size_t>((source.n_rows - 1) * source.row_stride + shape.n_in);
  const std::size_t bytes = is_coded ? elements / 2 : elements * dtype_bytes(source.dtype);
  const auto scale_bytes =
      is_coded ? static_cast<std::size_t>((source.n_rows - 1) * source.scale_row_stride +
                                          div_up(shape.n_in, kNvfp4Group))
               : std::size_t{0};
  if (pack_source_ == nullptr || pack_source_->bytes() < bytes + scale_bytes) {
    runtime_.synchronize();  // the old buffer may be in use
    pack_source_ = allocate(bytes + scale_bytes);
  }
  auto* const there = static_cast<std::byte*>(pack_source_->data());
  runtime_.write(there, source.data, bytes);
  if (is_coded) runtime_.write(there + bytes, source.scales, scale_bytes);
  const std::int64_t n_in_padded =
      round_up(div_up(shape.n_in, shape.in_group) * shape.in_group_padded, kColumnAlign);
  launch_pack(stream(),
              {there, source.dtype, source.n_rows, source.row_stride, shape, n_in_padded, first_out,
               destination, reinterpret_cast<const std::uint8_t*>(there + bytes),
               source.scale_row_stride, source.matrix_scale});
  return -1;
}

std::size_t CudaBackend::moe_scratch_bytes(const MoeConfig& config, std::int64_t d_model,
                                           std::int64_t max_rows, std::int32_t) const {
  return cuda::moe_scratch_bytes(config, d_model, max_rows);
}

void CudaBackend::grow(std::unique_ptr<Buffer>& buffer, std::size_t bytes) {
  runtime_.synchronize();  // the old one may be in use
  records_.clear();
  replace(buffer, bytes);
}

void CudaBackend::grow_scratch(std::unique_ptr<Buffer>& buffer, std::size_t bytes) {
  group_ == nullptr ? grow(buffer, bytes) : replace(buffer, bytes);
}

// note: with ranks the old one stays: to give it back waits for the other lane too, which may wait
// for another rank, which may wait so for this one. It doubles, so they are few.
void CudaBackend::replace(std::unique_ptr<Buffer>& buffer, std::size_t bytes) {
  if (group_ != nullptr && buffer != nullptr) {
    bytes = std::max(bytes, 2 * buffer->bytes());
    outgrown_.push_back(std::move(buffer));
  }
  buffer = allocate(bytes);
}

// The first pass of its kind is launched as it is, and finds the buffers' sizes; the second is
// recorded, and from then on the record is played. Its kind is all that launches depend on: rows of
// each segment, and how far attention may reach.
//
// The background goes layer by layer, with two of them on their way at most, so that the GPU is the
// interaction lane's soon after its pass begins.
void CudaBackend::run_layers(const Segments& segments, std::int32_t n_layers,
                             const std::function<void(std::int32_t)>& layer) {
  if (turn_ != nullptr || meets_by_hosts_) {  // recorded as a whole, or not at all
    for (std::int32_t i = 0; i < n_layers; ++i) layer(i);
    return;
  }
  staged(segments);
  kind_.assign(1, attention_reach(segments));
  for (std::int32_t i = 0; i < segments.count; ++i) kind_.push_back(segments.data[i].n_rows);
  const bool is_background = lane_ == LaneKind::kBackground;
  const std::int32_t n_parts = is_background ? n_layers : 1;
  const auto part = [&](std::int32_t first) {
    for (std::int32_t i = first; i < (is_background ? first + 1 : n_layers); ++i) layer(i);
  };
  Records* const records = records_of(kind_);
  if (records != nullptr && records->empty()) {
    Records made;
    for (std::int32_t i = 0; i < n_parts; ++i) made.push_back(runtime_.record([&] { part(i); }));
    *records = std::move(made);
  }
  for (std::int32_t i = 0; i < n_parts; ++i) {
    if (records == nullptr)
      part(i);
    else
      stream().play(*(*records)[static_cast<std::size_t>(i)]);
    if (is_background) runtime_.keep_close();
  }
}

CudaBackend::Records* CudaBackend::records_of(const std::vector<std::int64_t>& kind) {
  const auto found = records_.find(kind);
  if (found != records_.end()) return &found->second;
  if (records_.size() >= kMaxRecords) {
    runtime_.synchronize();  // one of them may be at work
    records_.clear();
  }
  records_.try_emplace(kind);
  return nullptr;
}

// One block of memory: the segments, then the ranges that they point to.
Segments CudaBackend::staged(const Segments& segments) {
  if (turn_ != nullptr) return turn_->on_device(segments);
  const auto count = static_cast<std::size_t>(segments.count);
  std::size_t n_ranges = 0;
  for (std::size_t i = 0; i < count; ++i)
    n_ranges += static_cast<std::size_t>(segments.data[i].n_forgotten);
  const std::size_t bytes = count * sizeof(Segment) + n_ranges * sizeof(PositionRange);
  if (segments_ == nullptr || segments_->bytes() < bytes) {
    grow(segments_, 2 * bytes);
    staged_.clear();
  }
  auto* const device = static_cast<std::byte*>(segments_->data());
  wanted_.assign(bytes, std::byte{0});
  std::size_t range_at = count * sizeof(Segment);
  for (std::size_t i = 0; i < count; ++i) {
    Segment segment;
    std::memset(static_cast<void*>(&segment), 0, sizeof segment);  // its padding is compared too
    segment = segments.data[i];
    const auto range_bytes = static_cast<std::size_t>(segment.n_forgotten) * sizeof(PositionRange);
    if (range_bytes > 0) std::memcpy(wanted_.data() + range_at, segment.forgotten, range_bytes);
    segment.forgotten = reinterpret_cast<const PositionRange*>(device + range_at);
    std::memcpy(wanted_.data() + i * sizeof segment, &segment, sizeof segment);
    range_at += range_bytes;
  }
  if (wanted_ != staged_) {
    runtime_.copy(device, runtime_.stage(wanted_.data(), bytes), bytes);
    staged_.swap(wanted_);
  }
  return {static_cast<const Segment*>(segments_->data()), segments.count, segments.n_rows};
}

void CudaBackend::do_embed_text(const EmbedTextArgs& args) {
  EmbedTextArgs on_device = args;
  const std::size_t bytes = static_cast<std::size_t>(args.n_rows) * sizeof(std::int32_t);
  on_device.ids = static_cast<const std::int32_t*>(runtime_.stage(args.ids, bytes));
  if (args.rows != nullptr)
    on_device.rows = static_cast<const std::int32_t*>(runtime_.stage(args.rows, bytes));
  launch_embed_text(stream(), on_device);
}

void CudaBackend::do_embed_audio(const EmbedAudioArgs& args) {
  EmbedAudioArgs on_device = args;
  on_device.bins = static_cast<const std::uint8_t*>(runtime_.stage(
      args.bins, static_cast<std::size_t>(args.n_rows) * static_cast<std::size_t>(args.n_mels)));
  if (args.rows != nullptr)
    on_device.rows = static_cast<const std::int32_t*>(
        runtime_.stage(args.rows, static_cast<std::size_t>(args.n_rows) * sizeof(std::int32_t)));
  launch_embed_audio(stream(), on_device);
}

void CudaBackend::do_norm(const NormArgs& args) { launch_norm(stream(), args); }

// Room for rows that are quantised before they meet a quantised matrix.
void* CudaBackend::quantised(std::size_t bytes) {
  if (bytes > 0 && (quantised_ == nullptr || quantised_->bytes() < bytes))
    grow_scratch(quantised_, bytes);
  return quantised_ == nullptr ? nullptr : quantised_->data();
}

void CudaBackend::do_linear(const LinearArgs& args) {
  for (std::int32_t p = 0; p < args.n_parts; ++p) {
    LinearArgs part = args;
    if (!args.w.is_paired) part.activated = {};
    part.w = part_of(args.w, args.n_parts, p);
    part.x = launch_quantise_rows(stream(), columns_from(args.x, p * part.w.n_in), args.n_rows,
                                  part.w, quantised(quantised_rows_bytes(args.n_rows, part.w)));
    part.y += p * args.y_part_stride;
    launch_linear(stream(), part);
  }
  if (args.activated.data != nullptr && !args.w.is_paired)
    launch_silu_mul(stream(), silu_mul_of(args));
}

void CudaBackend::do_kv_append(const KvAppendArgs& args) {
  KvAppendArgs on_device = args;
  on_device.segments = staged(args.segments);
  launch_kv_append(stream(), on_device);
}

void CudaBackend::do_attention(const AttentionArgs& args) {
  const AttentionPlan plan = plan_attention(args);
  std::size_t partial_bytes = plan.partial_bytes;
  if (turn_ != nullptr) {  // room for its later passes too: while they are recorded none is made
    AttentionArgs later = args;
    later.segments = turn_->later_segments();
    partial_bytes = std::max(partial_bytes, plan_attention(later).partial_bytes);
  }
  if (partial_bytes > 0 && (partial_ == nullptr || partial_->bytes() < partial_bytes))
    grow_scratch(partial_, partial_bytes);
  AttentionArgs on_device = args;
  on_device.segments = staged(args.segments);
  launch_attention(stream(), on_device, plan,
                   partial_ == nullptr ? nullptr : static_cast<float*>(partial_->data()));
}

void CudaBackend::do_conv_add_norm(const ConvAddNormArgs& args) {
  ConvAddNormArgs on_device = args;
  on_device.segments = staged(args.segments);
  launch_conv_add_norm(stream(), on_device);
}

void CudaBackend::do_silu_mul(const SiluMulArgs& args) { launch_silu_mul(stream(), args); }

void CudaBackend::do_moe(const MoeArgs& args) {
  launch_moe(stream(), args, quantised(moe_quantised_bytes(args)));
}

void CudaBackend::do_fold(const FoldArgs& args) { launch_fold(stream(), args); }

void CudaBackend::do_sample(const SampleArgs& args) {
  const auto n_rows = static_cast<std::size_t>(args.n_rows);
  const std::size_t bytes = n_rows * sizeof(std::int32_t);
  if (tokens_ == nullptr || tokens_->bytes() < bytes) replace(tokens_, bytes);
  SampleArgs on_device = args;
  on_device.rows =
      static_cast<const SampleRow*>(runtime_.stage(args.rows, n_rows * sizeof(SampleRow)));
  on_device.tokens = static_cast<std::int32_t*>(tokens_->data());
  launch_sample(stream(), on_device);
  wait([&] { runtime_.read(args.tokens, on_device.tokens, bytes); });
}

}  // namespace duplex::cuda
