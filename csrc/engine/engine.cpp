// Loading, opening and closing: nothing here computes.
#include "engine/engine.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "backend/registry.h"
#include "core/error.h"

namespace duplex {
namespace {

// Addresses of a process end at 2^47; a pool beyond a quarter of them is a slip of the pen.
constexpr std::int64_t kMaxMemoryBytes = std::int64_t{1} << 45;
constexpr std::int64_t kMaxPageBytes = std::int64_t{1} << 30;
// Of a pass of the background lane: its operations are cut into shorter tasks, so that the
// interaction lane waits less.
constexpr std::int32_t kBackgroundRows = 64;
// Rows backed when a session opens; afterwards each turn backs what the next may need.
constexpr std::int64_t kRowsBackedAtOpen = 32;

std::unique_ptr<PagePool> make_pool(Backend& backend, const SequenceLayout& layout,
                                    const EngineOptions& options,
                                    const std::shared_ptr<RankLeader>& ranks) {
  const auto page_bytes = static_cast<std::int64_t>(layout.page_bytes);
  const std::int64_t n_pages = options.memory_bytes / page_bytes;
  check<CapacityError>(n_pages >= layout.window_pages() + 1,
                       "memory: expected room for one session, ",
                       (layout.window_pages() + 1) * page_bytes * options.n_ranks, " bytes, found ",
                       options.memory_bytes * options.n_ranks,
                       "; give the engine more memory or a smaller max_batch_rows");
  auto memory = backend.create_page_memory(layout.page_bytes, n_pages);
  if (ranks != nullptr) memory = std::make_unique<LeaderMemory>(ranks, std::move(memory));
  return std::make_unique<PagePool>(std::move(memory));
}

// Looks at the config before anything is allocated.
ModelConfig checked(ModelConfig config, const EngineOptions& options, const Engine* beside) {
  config.validate();
  check_max_rows(options.max_batch_rows);
  check(options.dtype == DType::kF32 || options.dtype == DType::kBF16,
        "dtype: expected float32 or bfloat16, found ", dtype_name(options.dtype));
  check(takes_rows(options.weights, options.dtype), "weights: expected ", dtype_name(options.dtype),
        " (the dtype), int8, int4, or mxfp8 or nvfp4 with the dtype bfloat16, found ",
        dtype_name(options.weights));
  check(options.kv_dtype == options.dtype || options.kv_dtype == DType::kInt8,
        "kv_dtype: expected ", dtype_name(options.dtype), " (the dtype) or int8, found ",
        dtype_name(options.kv_dtype));
  check(options.memory_bytes > (beside == nullptr ? 0 : -1) &&
            options.memory_bytes <= kMaxMemoryBytes,
        "memory: expected 1 to ", kMaxMemoryBytes, " bytes, found ", options.memory_bytes);
  check(options.page_bytes >= 0 && options.page_bytes <= kMaxPageBytes, "page: expected 0 to ",
        kMaxPageBytes, " bytes, found ", options.page_bytes);
  return config;
}

// Of the model, and of its multi-token-prediction layers where they are loaded. One pool serves
// both, so their pages have one size.
std::pair<SequenceLayout, SequenceLayout> make_layouts(const ModelConfig& config,
                                                       const EngineOptions& options,
                                                       std::size_t granularity) {
  const RowLimits limits{options.rewind_rows, options.max_batch_rows};
  SequenceLayout layout = SequenceLayout::make(config, options.kv_dtype, granularity, limits);
  if (config.mtp.layers.empty()) return {layout, {}};
  RowLimits mtp_limits = limits;
  mtp_limits.rewind_rows += kWaitingRows + std::ssize(config.mtp.layers);
  SequenceLayout mtp_layout =
      SequenceLayout::make(config.mtp_model(), options.kv_dtype, layout.page_bytes, mtp_limits);
  layout = SequenceLayout::make(config, options.kv_dtype, mtp_layout.page_bytes, limits);
  return {layout, mtp_layout};
}

}  // namespace

Engine::Engine(ModelConfig config, WeightSource source, const EngineOptions& options,
               const LoadProgress& progress, const Engine* beside,
               std::shared_ptr<RankLeader> ranks)
    : model_{.config = checked(std::move(config), options, beside),
             .options = options,
             .ranks = std::move(ranks)} {
  const ModelConfig& checked_config = model_.config;
  if (beside != nullptr) beside->interaction_->owner().check_here();
  auto backend = beside != nullptr ? beside->interaction_->backend().background_lane()
                                   : create_backend(options.device, options.backend);
  check(backend->has_kv_dtype(options.kv_dtype), "kv_dtype: device '", backend->name(),
        "' keeps keys and values in float32 or bfloat16, found ", dtype_name(options.kv_dtype),
        "; take kv_dtype=\"auto\"");
  const int n_ranks = model_.ranks == nullptr ? 1 : model_.ranks->group().n_ranks();
  check(options.n_ranks == n_ranks, "n_ranks: expected those of the group, ", n_ranks, ", found ",
        options.n_ranks);
  const Shard shard =
      make_shard(checked_config, options.weights, 0, options.n_ranks, options.reduction);
  model_.share = shard_config(checked_config, shard);
  if (model_.ranks != nullptr) model_.ranks->connect(*backend, {model_.share, shard, options});
  model_.weights = load_weights(checked_config, std::move(source), {options.dtype, options.weights},
                                *backend, progress, shard);
  arena_bytes_ = static_cast<std::int64_t>(model_.weights.arena->bytes());
  const bool is_sharing = beside != nullptr && options.memory_bytes == 0;
  const std::size_t granularity =
      is_sharing ? beside->pool_->page_bytes()
                 : static_cast<std::size_t>(
                       round_up(std::max<std::int64_t>(options.page_bytes, 1),
                                static_cast<std::int64_t>(backend->page_granularity())));
  std::tie(model_.layout, model_.mtp_layout) = make_layouts(model_.share, options, granularity);
  check(!is_sharing || model_.layout.page_bytes == granularity,
        "memory: this model needs pages of ", model_.layout.page_bytes,
        " bytes, and those of the engine beside it have ", granularity,
        "; load that one with page = ", model_.layout.page_bytes,
        ", or give this one memory of its own");
  pool_ = is_sharing ? beside->pool_ : make_pool(*backend, model_.layout, options, model_.ranks);
  if (checked_config.audio) analyzer_ = std::make_unique<DmelAnalyzer>(*checked_config.audio);
  interaction_ = std::make_unique<Lane>(LaneKind::kInteraction, model_, std::move(backend),
                                        options.max_batch_rows);
}

Engine::~Engine() { close(); }

void Engine::close() {
  if (!interaction_->owner().is_here()) return;
  close_lanes();
  // Whoever keeps a closed session or this engine does not keep the weights.
  const std::lock_guard weights(weights_mutex_);
  model_.weights.arena.reset();
}

void Engine::close_lanes() {
  std::unique_lock lock(mutex_);
  is_closed_ = true;  // from here on no session and no lane is added
  lock.unlock();
  // Calls at work end first.
  const std::lock_guard interaction(interaction_->mutex());
  interaction_->close();
  std::unique_lock<std::mutex> background;
  if (background_ != nullptr) {
    background = std::unique_lock(background_->mutex());
    background_->close();
  }
  lock.lock();
  for (Session* session : sessions_) session->drop();
  sessions_.clear();
}

bool Engine::is_closed() const {
  interaction_->owner().check_here();
  const std::lock_guard lock(mutex_);
  return is_closed_;
}

void Engine::check_open() const {
  interaction_->owner().check_here();
  check<SessionClosed>(!is_closed_, "engine: it is closed; load it again");
}

Lane& Engine::lane(LaneKind kind) {
  if (kind == LaneKind::kInteraction) return *interaction_;
  if (background_ == nullptr)
    background_ = std::make_unique<Lane>(kind, model_, interaction_->backend().background_lane(),
                                         std::min(model_.options.max_batch_rows, kBackgroundRows));
  return *background_;
}

std::shared_ptr<Session> Engine::open_session(SessionOptions options) {
  interaction_->owner().check_here();  // before memory is asked for: in a fork it is the parent's
  options.sampling.validate();
  check(options.max_positions >= 0, "max_positions: expected a positive number, found ",
        options.max_positions);
  check(options.max_drafts >= 0 && options.max_drafts <= kMaxDrafts,
        "speculate: expected 0 (off) to ", kMaxDrafts, " tokens, found ", options.max_drafts);
  if (options.max_positions == 0) options.max_positions = model_.options.max_positions;
  const SequenceLayout& layout = model_.layout;
  std::optional<Endless>& endless = options.endless;
  if (endless) endless = endless->with_limit(options.max_positions, layout);
  Sequence sequence = Sequence::open(
      *pool_, layout, endless ? endless->held_positions(layout) : options.max_positions);
  auto speculation =
      interaction_->make_speculation(*pool_, options.max_drafts, options.max_positions);
  return adopt(std::move(sequence), std::move(speculation), options);
}

std::shared_ptr<Session> Engine::adopt(Sequence sequence, std::optional<Speculation> speculation,
                                       const SessionOptions& options) {
  std::unique_lock lock(mutex_);
  check_open();
  Lane& lane = this->lane(options.lane);
  lock.unlock();  // a session that fails takes it to close
  std::shared_ptr<Session> session(
      new Session(shared_from_this(), lane, std::move(sequence), std::move(speculation), options),
      OwnerDelete());
  lane.back_ahead(*session, kRowsBackedAtOpen);
  const std::lock_guard again(mutex_);
  check_open();
  sessions_.push_back(session.get());
  return session;
}

void Engine::unregister(Session& session) {
  const std::lock_guard lock(mutex_);
  std::erase(sessions_, &session);
}

std::vector<Turn> Engine::step(std::span<const StepRequest> requests) {
  Lane& lane = requests.empty() ? *interaction_ : requests.front().session->lane();
  for (const StepRequest& request : requests)
    check(&request.session->lane() == &lane,
          "step: expected sessions of one lane, found interaction and background sessions; step "
          "them in two calls");
  return lane.step(requests);
}

std::string Engine::description() const {
  const Backend& backend = interaction_->backend();
  const Shard& shard = model_.weights.shard;
  std::string text = backend.description();
  if (model_.ranks != nullptr) {
    const int n_threads = backend.n_threads();
    const Transport* transport = model_.ranks->group().transport();
    text = text.substr(0, text.find(',')) + ", " + std::to_string(shard.size) + " ranks x " +
           std::to_string(n_threads) + (n_threads == 1 ? " thread, " : " threads, ") +
           (transport == nullptr ? backend.transport() : transport->name());
  }
  if (model_.options.reduction == Reduction::kInvariant)
    text += ", reduction of " + std::to_string(shard.total_parts()) +
            (shard.total_parts() == 1 ? " part" : " parts in order");
  else if (model_.ranks != nullptr)
    text += model_.options.reduction == Reduction::kSwitch ? ", reduction in the switch"
                                                           : ", reduction in rank order";
  return text;
}

std::vector<float> Engine::embed_text(std::span<const std::int32_t> ids) {
  check_ids(config(), ids);
  InputRows input;
  for (const std::int32_t id : ids) input.add_text(id);
  return interaction_->embed(input);
}

std::vector<float> Engine::embed_audio(std::span<const float> samples) {
  check(analyzer_ != nullptr, "audio: this checkpoint has no audio tower (no audio_config)");
  DmelStream audio(*analyzer_);
  audio.push(samples);
  audio.pad_to_frame();
  InputRows input;
  input.add_frames(audio);
  return interaction_->embed(input);
}

std::vector<float> Engine::embed_image(Image image) {
  InputRows input;
  input.add_image(check_image(config(), std::move(image)));
  return interaction_->embed(input);
}

std::vector<std::pair<std::string, std::int64_t>> Engine::memory_plan() const {
  interaction_->owner().check_here();
  std::vector<std::pair<std::string, std::int64_t>> plan;
  plan.emplace_back("weights", arena_bytes());
  interaction_->add_plan("workspace.", plan);
  const std::lock_guard lock(mutex_);
  if (background_ != nullptr) background_->add_plan("background.", plan);
  const PoolStats pool = pool_->stats();
  plan.emplace_back("page_pool", pool.n_pages * pool.page_bytes);
  return plan;
}

std::unique_lock<std::mutex> Engine::hold_weights() const {
  interaction_->owner().check_here();
  std::unique_lock lock(weights_mutex_);
  check<SessionClosed>(!is_closed(), "engine: it is closed; load it again");
  return lock;
}

std::uint64_t Engine::weights_hash() const {
  const auto held = hold_weights();
  return arena_hash(model_.weights, interaction_->backend());
}

void Engine::write_arena(const ArenaWriter& write) const {
  const auto held = hold_weights();
  duplex::write_arena(model_.weights, interaction_->backend(), write);
}

EngineStats Engine::stats() const {
  interaction_->owner().check_here();
  EngineStats stats;
  interaction_->add_counts(stats);
  const std::lock_guard lock(mutex_);
  if (background_ != nullptr) background_->add_counts(stats);
  stats.pool = pool_->stats();
  stats.n_sessions = static_cast<std::int64_t>(sessions_.size());
  return stats;
}

}  // namespace duplex
