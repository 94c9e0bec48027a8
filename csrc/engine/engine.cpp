#include "engine/engine.h"

#include <algorithm>
#include <utility>

#include "backend/registry.h"
#include "core/error.h"

namespace duplex {
namespace {

// Patches that the vision tower keeps buffers for.
constexpr std::int64_t kMaxPatchesAtOnce = 64;
// Addresses of a process end at 2^47; a pool beyond a quarter of them is a slip of the pen.
constexpr std::int64_t kMaxMemoryBytes = std::int64_t{1} << 45;
// Rows backed when a session opens; afterwards each turn backs what the next may need.
constexpr std::int64_t kRowsBackedAtOpen = 32;

std::unique_ptr<PagePool> make_pool(Backend& backend, const SequenceLayout& layout,
                                    std::int64_t memory_bytes) {
  const auto page_bytes = static_cast<std::int64_t>(layout.page_bytes);
  const std::int64_t n_pages = memory_bytes / page_bytes;
  check<CapacityError>(n_pages >= layout.window_pages() + 1,
                       "memory: expected room for one session, ",
                       (layout.window_pages() + 1) * page_bytes, " bytes, found ", memory_bytes,
                       "; give the engine more memory or a smaller max_batch_rows");
  return std::make_unique<PagePool>(backend.create_page_memory(layout.page_bytes, n_pages));
}

// Looks at the config before anything is allocated.
ModelConfig checked(ModelConfig config, const EngineOptions& options) {
  config.validate();
  check(options.max_batch_rows >= 1 && options.max_batch_rows <= 65536,
        "max_batch_rows: expected 1 to 65536, found ", options.max_batch_rows);
  check(options.weights == options.dtype || is_quantised(options.weights), "weights: expected ",
        dtype_name(options.dtype), " (the dtype), int8 or int4, found ",
        dtype_name(options.weights));
  check(options.kv_dtype == options.dtype || options.kv_dtype == DType::kInt8,
        "kv_dtype: expected ", dtype_name(options.dtype), " (the dtype) or int8, found ",
        dtype_name(options.kv_dtype));
  check(options.memory_bytes > 0 && options.memory_bytes <= kMaxMemoryBytes,
        "memory: expected 1 to ", kMaxMemoryBytes, " bytes, found ", options.memory_bytes);
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
               const LoadProgress& progress)
    : config_(checked(std::move(config), options)),
      options_(options),
      backend_(create_backend(options.device, options.backend)),
      sampler_(config_.unpadded_vocab_size) {
  check(backend_->has_kv_dtype(options.kv_dtype), "kv_dtype: device '", backend_->name(),
        "' keeps keys and values in float32 or bfloat16, found ", dtype_name(options.kv_dtype),
        "; the CPU has int8");
  const WeightDTypes dtypes{options.dtype, options.weights};
  if (const auto* packed = std::get_if<PackedArena>(&source)) {
    weights_ = load_packed_weights(config_, *packed, dtypes, *backend_, progress);
  } else {
    TensorSource tensors(std::move(std::get<std::vector<SourceTensor>>(source)));
    weights_ = load_weights(config_, tensors, dtypes, *backend_, progress);
  }
  auto [layout, mtp_layout] = make_layouts(config_, options, backend_->page_granularity());
  layout_ = std::move(layout);
  pool_ = make_pool(*backend_, layout_, options.memory_bytes);
  model_ = std::make_unique<Inkling>(config_, weights_, layout_, *backend_, options.max_batch_rows);
  if (!config_.mtp.layers.empty())
    drafts_ = std::make_unique<DraftRunner>(config_, weights_, std::move(mtp_layout), *backend_,
                                            *model_, sampler_);
  if (config_.audio) analyzer_ = std::make_unique<DmelAnalyzer>(*config_.audio);
  if (config_.vision)
    vision_ = std::make_unique<HmlpEncoder>(
        *config_.vision,
        HmlpWeights{weights_.vision.linear, weights_.vision.norm, weights_.vision.final_norm,
                    kTowerNormEps},
        *backend_, std::min<std::int64_t>(options.max_batch_rows, kMaxPatchesAtOnce));
  ids_.resize(static_cast<std::size_t>(options.max_batch_rows));
}

Engine::~Engine() { close(); }

void Engine::close() {
  const std::lock_guard lock(mutex_);
  is_closed_ = true;
  for (Session* session : sessions_) session->drop();
  sessions_.clear();
}

Engine::Call::Call(Engine& engine, Session& session) : busy(session), lock(engine.mutex_) {
  engine.check_open();
  session.check_open();
}

void Engine::check_open() const {
  check<SessionClosed>(!is_closed_, "engine: it is closed; load it again");
}

std::shared_ptr<Session> Engine::open_session(const SessionOptions& options) {
  options.sampling.validate();
  check(options.max_positions >= 0, "max_positions: expected a positive number, found ",
        options.max_positions);
  check(options.max_drafts >= 0 && options.max_drafts <= kMaxDrafts,
        "speculate: expected 0 (off) to ", kMaxDrafts, " tokens, found ", options.max_drafts);
  const std::lock_guard lock(mutex_);
  check_open();
  const std::int64_t max_positions =
      options.max_positions > 0 ? options.max_positions : options_.max_positions;
  Sequence sequence = Sequence::open(*pool_, layout_, max_positions);
  std::optional<Drafter> drafter;
  if (drafts_ != nullptr && options.max_drafts > 0)
    drafter = drafts_->make_drafter(*pool_, max_positions);
  return adopt(std::move(sequence), std::move(drafter), options.sampling, options.max_drafts);
}

std::shared_ptr<Session> Engine::adopt(Sequence sequence, std::optional<Drafter> drafter,
                                       const SamplingParams& sampling, std::int32_t max_drafts) {
  sessions_.reserve(sessions_.size() + 1);
  reserve_logits(max_drafts);
  auto session = std::make_shared<Session>(shared_from_this(), std::move(sequence),
                                           std::move(drafter), sampling, max_drafts);
  sessions_.push_back(session.get());
  back_ahead(*session, kRowsBackedAtOpen);
  return session;
}

// Of all rows that are sampled behind at once with one session more, so that a turn allocates none.
void Engine::reserve_logits(std::int32_t max_drafts) {
  if (drafts_ != nullptr) drafts_->reserve(sessions_.size() + 1);
  std::size_t n_rows = 1 + static_cast<std::size_t>(max_drafts);
  for (const Session* session : sessions_)
    n_rows += 1 + static_cast<std::size_t>(session->max_drafts_);
  n_rows = std::min(n_rows,
                    std::max(sessions_.size() + 1, static_cast<std::size_t>(model_->max_rows())));
  head_rows_.reserve(n_rows);
  const std::size_t n_logits = n_rows * static_cast<std::size_t>(config_.unpadded_vocab_size);
  if (logits_.size() < n_logits) logits_.resize(n_logits);
}

void Engine::unregister(Session& session) { std::erase(sessions_, &session); }

// Maps pages for rows that will come, so that none is mapped inside a turn. A session at its limit
// is left alone here: it hears of it when it really needs the row.
void Engine::back_ahead(Session& session, std::int64_t n_rows) {
  n_rows = std::min<std::int64_t>(n_rows, options_.max_batch_rows);
  try {
    session.sequence_->reserve(n_rows);
    if (session.drafter_) session.drafter_->reserve(n_rows, session.sequence_->length());
  } catch (const CapacityError&) {
  }
}

void Engine::check_ids(std::span<const std::int32_t> ids) const {
  for (std::size_t i = 0; i < ids.size(); ++i)
    check(ids[i] >= 0 && ids[i] < config_.vocab_size, "text: token id ", i, " is ", ids[i],
          "; expected 0 to ", config_.vocab_size - 1);
}

Image Engine::check_image(Image image) const {
  check(config_.vision.has_value(),
        "image: this checkpoint has no vision tower (no vision_config)");
  image.n_patches = patch_grid(image.view(), config_.vision->patch_size).n_patches();
  const std::int32_t limit = config_.interaction ? config_.interaction->max_image_patches : 0;
  check(limit <= 0 || image.n_patches <= limit, "image: ", image.height, "x", image.width, " is ",
        image.n_patches, " patches; this checkpoint takes at most ", limit,
        " in a micro-turn, so scale it down");
  return image;
}

std::vector<float> Engine::append_text(Session& session, std::span<const std::int32_t> ids,
                                       LogitsWanted wanted) {
  check_ids(ids);
  const Call call(*this, session);
  session.input_.clear();
  for (const std::int32_t id : ids) session.input_.add_text(id);
  return append_input(session, wanted);
}

std::vector<float> Engine::append_audio(Session& session, std::span<const float> samples,
                                        bool is_end_of_audio, LogitsWanted wanted) {
  const Call call(*this, session);
  check(session.audio_.has_value(), "audio: this checkpoint has no audio tower (no audio_config)");
  DmelStream& audio = *session.audio_;
  const auto n_samples = static_cast<std::int64_t>(samples.size()) + audio.state().n_partial;
  const auto n_new = is_end_of_audio ? div_up(n_samples, kHopSamples) : n_samples / kHopSamples;
  const auto n_rows = static_cast<std::int64_t>(audio.frames_ready()) + n_new;
  session.check_room(n_rows);
  audio.push(samples);
  if (is_end_of_audio) audio.pad_to_frame();
  session.input_.clear();
  session.input_.add_frames(audio);
  return append_input(session, wanted);
}

std::vector<float> Engine::append_image(Session& session, Image image, LogitsWanted wanted) {
  image = check_image(std::move(image));
  const Call call(*this, session);
  session.input_.clear();
  session.input_.add_image(std::move(image));
  return append_input(session, wanted);
}

// Appends session.input_ behind the pending token; the logits are those of session.input_ alone.
std::vector<float> Engine::append_input(Session& session, LogitsWanted wanted) {
  InputRows& input = session.input_;
  const bool has_pending = session.pending_token_ != kNoToken;
  session.check_room(static_cast<std::int64_t>(input.rows.size()));
  std::vector<float> logits;
  if (input.rows.empty()) {
    session.set_mark();  // sound that waits for the rest of its frame
    return logits;
  }
  if (has_pending) input.rows.insert(input.rows.begin(), {RowKind::kText, session.pending_token_});
  session.pending_token_ = kNoToken;
  const auto n_vocab = static_cast<std::size_t>(config_.unpadded_vocab_size);
  Session* const only[] = {&session};
  all_logits_ = wanted == LogitsWanted::kAll ? &logits : nullptr;
  backend_->begin_pass();
  try {
    run_rows(only);
  } catch (...) {
    all_logits_ = nullptr;
    backend_->end_pass();
    throw;
  }
  all_logits_ = nullptr;
  if (wanted == LogitsWanted::kAll && has_pending)
    logits.erase(logits.begin(), logits.begin() + static_cast<std::ptrdiff_t>(n_vocab));
  if (wanted == LogitsWanted::kLast) {
    const void* const row[] = {session.head_row_.data()};
    logits.resize(n_vocab);
    model_->logits(row, logits.data());
  }
  backend_->end_pass();
  session.set_mark();
  return logits;
}

std::vector<float> Engine::embed_text(std::span<const std::int32_t> ids) {
  check_ids(ids);
  const std::lock_guard lock(mutex_);
  check_open();
  InputRows input;
  for (const std::int32_t id : ids) input.add_text(id);
  return embed_all(input);
}

std::vector<float> Engine::embed_audio(std::span<const float> samples) {
  check(analyzer_ != nullptr, "audio: this checkpoint has no audio tower (no audio_config)");
  DmelStream audio(*analyzer_);
  audio.push(samples);
  audio.pad_to_frame();
  const std::lock_guard lock(mutex_);
  check_open();
  InputRows input;
  input.add_frames(audio);
  return embed_all(input);
}

std::vector<float> Engine::embed_image(Image image) {
  image = check_image(std::move(image));
  const std::lock_guard lock(mutex_);
  check_open();
  InputRows input;
  input.add_image(std::move(image));
  return embed_all(input);
}

std::string Engine::description() const { return backend_->description(); }

std::vector<std::pair<std::string, std::int64_t>> Engine::memory_plan() const {
  std::vector<std::pair<std::string, std::int64_t>> plan;
  plan.emplace_back("weights", arena_bytes());
  for (const auto& [name, bytes] : model_->plan())
    plan.emplace_back("workspace." + name, static_cast<std::int64_t>(bytes));
  if (drafts_ != nullptr)
    for (const auto& [name, bytes] : drafts_->layers().plan())
      plan.emplace_back("workspace." + name, static_cast<std::int64_t>(bytes));
  const std::lock_guard lock(mutex_);
  const PoolStats pool = pool_->stats();
  plan.emplace_back("page_pool", pool.n_pages * pool.page_bytes);
  return plan;
}

void Engine::write_arena(const ArenaWriter& write) const {
  duplex::write_arena(weights_, *backend_, write);
}

EngineStats Engine::stats() const {
  const std::lock_guard lock(mutex_);
  EngineStats stats = counts_;
  stats.pool = pool_->stats();
  stats.n_sessions = static_cast<std::int64_t>(sessions_.size());
  return stats;
}

}  // namespace duplex
