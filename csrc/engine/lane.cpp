// What a lane is made of, and the calls that append outside a micro-turn.
#include "engine/lane.h"

#include <algorithm>
#include <functional>
#include <utility>

#include "core/error.h"
#include "engine/engine.h"

namespace duplex {
namespace {

// Patches that the vision tower keeps buffers for.
constexpr std::int64_t kMaxPatchesAtOnce = 64;

std::unique_ptr<Inkling> make_model(LaneKind kind, const LoadedModel& model, Backend& backend,
                                    std::int32_t max_rows) {
  if (model.ranks != nullptr)
    return std::make_unique<LeaderModel>(*model.ranks, kind, model.share, model.weights,
                                         model.layout, backend, max_rows);
  return std::make_unique<Inkling>(model.share, model.weights, model.layout, backend, max_rows);
}

}  // namespace

Lane::Lane(LaneKind kind, const LoadedModel& model, std::unique_ptr<Backend> backend,
           std::int32_t max_rows)
    : kind_(kind),
      config_(model.config),
      backend_(std::move(backend)),
      model_(make_model(kind, model, *backend_, max_rows)),
      placed_(model, *model_) {
  if (!config_.mtp.layers.empty())
    drafts_ =
        std::make_unique<DraftRunner>(config_, model.weights, model.mtp_layout, *backend_, *model_);
  if (config_.vision)
    vision_ = std::make_unique<HmlpEncoder>(
        *config_.vision,
        HmlpWeights{model.weights.vision.linear, model.weights.vision.norm,
                    model.weights.vision.final_norm},
        *backend_, std::min<std::int64_t>(max_rows, kMaxPatchesAtOnce));
}

std::mutex& Lane::mutex() const {
  owner_.check_here();
  return mutex_;
}

void Lane::check_open() const {
  owner_.check_here();
  check<SessionClosed>(!is_closed_, "engine: it is closed; load it again");
}

Lane::Hold::Hold(Lane& lane, Session& session)
    : busy({&session}), lock(lane.mutex_), call(lane.calls_.front()) {
  lane.check_open();
  session.check_open();
  call.begin(session);
  lane.active_.assign(1, &call);
}

std::optional<Speculation> Lane::make_speculation(PagePool& pool, std::int32_t max_drafts,
                                                  std::int64_t max_positions) const {
  if (max_drafts == 0) return std::nullopt;
  Speculation speculation{.max_drafts = max_drafts};
  if (drafts_ != nullptr) speculation.drafter = drafts_->make_drafter(pool, max_positions);
  return speculation;
}

void Lane::back(Session& session, std::int64_t n_rows) const {
  session.sequence().reserve(std::min<std::int64_t>(n_rows, model_->max_rows()));
}

// A session at its limit is left alone here: it hears of it when it really needs the row.
// Background work has no deadline to keep, and its callers no small share (Backend::run_awake).
void Lane::back_ahead(Session& session, std::int64_t n_rows) const {
  if (kind_ == LaneKind::kBackground) return;
  n_rows = std::min<std::int64_t>(n_rows, model_->max_rows());
  try {
    back(session, n_rows);
    if (Drafter* const drafter = session.drafter())
      drafter->reserve(n_rows, session.sequence().length());
  } catch (const CapacityError&) {
  }
}

void Lane::run_aside(const std::function<void()>& work) {
  const bool has_thread = kind_ == LaneKind::kBackground && owner_.is_here();  // no fork has it
  has_thread ? backend_->run_awake(work) : work();
}

void Lane::add_counts(EngineStats& stats) const {
  stats.passes += counts_.passes;
  stats.rows += counts_.rows;
  stats.drafted += counts_.drafted;
  stats.accepted += counts_.accepted;
  stats.launches += backend_->calls().launches;
  stats.waits += backend_->calls().waits;
}

void Lane::add_plan(const std::string& prefix,
                    std::vector<std::pair<std::string, std::int64_t>>& plan) const {
  for (const auto& [name, bytes] : model_->plan())
    plan.emplace_back(prefix + name, static_cast<std::int64_t>(bytes));
  if (drafts_ == nullptr) return;
  for (const auto& [name, bytes] : drafts_->layers().plan())
    plan.emplace_back(prefix + name, static_cast<std::int64_t>(bytes));
}

std::vector<float> Lane::append_text(Session& session, std::span<const std::int32_t> ids,
                                     LogitsWanted wanted) {
  check_ids(config_, ids);
  const Hold hold(*this, session);
  std::vector<float> logits = make_ready(session, std::ssize(ids), wanted);
  for (const std::int32_t id : ids) hold.call.input.add_text(id);
  return append_input(hold.call, wanted, std::move(logits));
}

std::vector<float> Lane::append_audio(Session& session, std::span<const float> samples,
                                      bool is_end_of_audio, LogitsWanted wanted) {
  const Hold hold(*this, session);
  check(session.now().audio.has_value(),
        "audio: this checkpoint has no audio tower (no audio_config)");
  check_finite(samples);
  DmelStream& audio = *session.now().audio;
  const auto n_samples = static_cast<std::int64_t>(samples.size()) + audio.state().n_partial;
  const auto n_new = is_end_of_audio ? div_up(n_samples, kHopSamples) : n_samples / kHopSamples;
  const auto n_rows = static_cast<std::int64_t>(audio.frames_ready()) + n_new;
  std::vector<float> logits = make_ready(session, n_rows, wanted);
  audio.push(samples);
  if (is_end_of_audio) audio.pad_to_frame();
  hold.call.input.add_frames(audio);
  return append_input(hold.call, wanted, std::move(logits));
}

std::vector<float> Lane::append_image(Session& session, Image image, LogitsWanted wanted) {
  image = check_image(config_, std::move(image));
  const Hold hold(*this, session);
  std::vector<float> logits = make_ready(session, image.n_patches, wanted);
  hold.call.input.add_image(std::move(image));
  return append_input(hold.call, wanted, std::move(logits));
}

// Room for rows, the token that waits, and their logits: what can fail comes first.
std::vector<float> Lane::make_ready(Session& session, std::int64_t n_rows, LogitsWanted wanted) {
  std::vector<float> logits;
  if (n_rows == 0) return logits;
  if (session.now().pending_token != kNoToken) ++n_rows;
  session.make_room(n_rows);
  if (session.sequence().backed() < session.sequence().length() + n_rows)
    run_aside([&] { back(session, n_rows); });
  const std::int64_t n_logits = wanted == LogitsWanted::kAll    ? n_rows
                                : wanted == LogitsWanted::kLast ? 1
                                                                : 0;
  logits.reserve(static_cast<std::size_t>(n_logits * config_.unpadded_vocab_size));
  return logits;
}

// Appends the input behind the pending token; the logits are those of the input alone.
std::vector<float> Lane::append_input(Call& call, LogitsWanted wanted, std::vector<float> logits) {
  Session& session = *call.session;
  InputRows& input = call.input;
  std::int32_t& pending = session.now().pending_token;
  const bool has_pending = pending != kNoToken;
  if (input.rows.empty()) {
    session.set_mark();  // sound that waits for the rest of its frame
    return logits;
  }
  if (has_pending) input.rows.insert(input.rows.begin(), {RowKind::kText, pending});
  pending = kNoToken;
  const auto n_vocab = static_cast<std::size_t>(config_.unpadded_vocab_size);
  const auto pass = [&] {
    run_rows(wanted == LogitsWanted::kAll ? &logits : nullptr);
    if (wanted != LogitsWanted::kLast) return;
    const void* const row[] = {session.now().head_row.data()};
    logits.resize(n_vocab);
    model_->logits(row, logits.data());
  };
  backend_->run_awake(std::ref(pass));
  if (wanted == LogitsWanted::kAll && has_pending)
    logits.erase(logits.begin(), logits.begin() + static_cast<std::ptrdiff_t>(n_vocab));
  session.set_mark();
  return logits;
}

}  // namespace duplex
