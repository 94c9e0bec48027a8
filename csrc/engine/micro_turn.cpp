// One micro-turn, from what a session heard to what it says. This file tells the whole story:
//
//   input  = [last token of the turn before] [background result] [typed text] [picture] [sound]
//   output = tokens, until the model says `listen`
//
// The last output token waits and is appended with the next input, so a silent micro-turn is one
// pass. Nothing here decides whose turn it is: the model's weights do. Next: batch.cpp, output.cpp.
#include <algorithm>
#include <chrono>
#include <functional>
#include <limits>
#include <utility>

#include "core/error.h"
#include "engine/lane.h"

namespace duplex {
namespace {

constexpr std::int32_t kDefaultTokens = 16;  // of a step when the checkpoint sets no limit

// Tokens that end a turn.
std::span<const std::int32_t> turn_stops(const ModelConfig& config) {
  if (config.interaction) return {&config.interaction->listen, 1};
  return config.eos_ids;
}

class Stopwatch {
 public:
  // Microseconds since construction or the last lap.
  std::int64_t lap_us() {
    const auto now = std::chrono::steady_clock::now();
    return std::chrono::duration_cast<std::chrono::microseconds>(now - std::exchange(last_, now))
        .count();
  }

 private:
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

}  // namespace

std::vector<Turn> Lane::step(std::span<const StepRequest> requests) {
  std::vector<Session*> sessions;
  for (const StepRequest& request : requests) sessions.push_back(request.session);
  const BusyGuard busy(sessions);
  const std::lock_guard lock(mutex());
  check_open();
  std::vector<Turn> turns(requests.size());
  const auto run = [&] { run_turns(requests, turns); };
  backend_->run_awake(std::ref(run));
  return turns;
}

void Lane::run_turns(std::span<const StepRequest> requests, std::span<Turn> turns) {
  TurnTiming timing;
  Stopwatch watch;

  // What each session heard, saw and was told since its last turn becomes rows.
  active_.clear();
  limits_.clear();
  for (std::size_t i = 0; i < requests.size(); ++i) {
    try {
      begin_turn(requests[i], turns[i]);
      active_.push_back(requests[i].session);
      limits_.push_back(token_limit(requests[i].max_tokens));
    } catch (const Error&) {
      turns[i].error = std::current_exception();
    }
  }
  timing.encode_us = watch.lap_us();

  // The rows of all sessions go through the model together. A device may go on with what they say.
  const bool has_said = run_on_device(active_, turn_stops(config_));
  if (!has_said) run_rows(active_);
  timing.append_us = watch.lap_us();

  // Every session that has more to say says it, one token a pass, or several where drafts hold.
  decode_turns(requests, turns, has_said);
  timing.decode_us = watch.lap_us();
  timing.total_us = timing.encode_us + timing.append_us + timing.decode_us;

  for (std::size_t i = 0; i < requests.size(); ++i) {
    if (turns[i].error) continue;
    Session& session = *requests[i].session;
    session.set_mark();
    turns[i].timing = timing;
    turns[i].position = session.sequence_->length();
    back_ahead(session, turns[i].n_rows + token_limit(requests[i].max_tokens));
    turns[i].kv_bytes = session.sequence_->held_bytes();
    if (session.drafter_) turns[i].kv_bytes += session.drafter_->held_bytes();
  }
}

std::int32_t Lane::token_limit(std::int32_t max_tokens) const {
  if (max_tokens >= 0) return max_tokens;
  return config_.interaction ? std::max(config_.interaction->max_output_tokens, 1) : kDefaultTokens;
}

void Lane::begin_turn(const StepRequest& request, Turn& turn) {
  Session& session = *request.session;
  session.check_open();
  const std::int32_t limit = token_limit(request.max_tokens);
  // In one piece: what another thread feeds from here on belongs to the next turn.
  std::unique_lock inbox_lock(session.inbox_mutex_);
  const InputPlan plan = plan_input(session, std::max(limit - 1, 0));
  check(plan.n_rows > 0 || limit == 0 || !session.head_row_.empty(),
        "step: nothing was fed and the session is empty; feed audio, an image or text first");
  const std::int64_t n_rows = plan.n_rows + std::max(limit - 1, 0);
  session.make_room(n_rows);
  back(session, n_rows);
  turn.forgotten = std::exchange(session.untold_, {});
  Inbox inbox = std::exchange(session.inbox_, {});
  inbox_lock.unlock();
  compose_input(session, plan, std::move(inbox));
  session.turn_ += std::max<std::int64_t>(plan.n_turns, 1);
  turn.turn = session.turn_;
  turn.epoch = session.call_epoch_;
  turn.n_rows = plan.n_rows;
  turn.merged_turns = std::max<std::int64_t>(plan.n_turns - 1, 0);
  turn.missing_samples = plan.missing_samples;
  turn.stopped = StopReason::kLimit;
}

// Of an endless session, sound beyond what there is room for, with `n_output` rows more, waits for
// the next turn: it could never be taken otherwise.
InputPlan Lane::plan_input(const Session& session, std::int64_t n_output) const {
  InputPlan plan;
  const Inbox& inbox = session.inbox_;
  const auto bracketed = [&](const std::vector<std::int32_t>& ids) {
    const std::int64_t brackets = config_.interaction ? 2 : 0;
    return ids.empty() ? 0 : static_cast<std::int64_t>(ids.size()) + brackets;
  };
  plan.n_rows = (session.pending_token_ != kNoToken ? 1 : 0) + bracketed(inbox.result) +
                bracketed(inbox.text);
  for (const Image& image : inbox.images) plan.n_rows += image.n_patches;
  if (!session.audio_) return plan;
  const std::int64_t room =
      session.endless_ ? session.endless_->room(*session.sequence_) - plan.n_rows - n_output
                       : std::numeric_limits<std::int64_t>::max() - 1;
  const std::int64_t n_samples =
      static_cast<std::int64_t>(session.audio_->frames_ready()) * kHopSamples +
      session.audio_->state().n_partial + static_cast<std::int64_t>(inbox.samples.size());
  plan.n_frames = n_samples / kHopSamples;
  if (config_.interaction && config_.interaction->audio_frames > 0) {
    // Whole micro-turns; late ones are merged, and what never came is silence.
    const std::int64_t frames = config_.interaction->audio_frames;
    plan.n_turns =
        std::max<std::int64_t>(std::min(plan.n_frames / frames, (room + 1) / (frames + 1)), 1);
    plan.n_frames = plan.n_turns * frames;
    plan.missing_samples = std::max<std::int64_t>(plan.n_frames * kHopSamples - n_samples, 0);
    plan.n_rows += plan.n_turns - 1;  // a `listen` for each merged turn
  } else {
    plan.n_frames = std::min(plan.n_frames, std::max<std::int64_t>(room, 1));
  }
  plan.n_rows += plan.n_frames;
  return plan;
}

// Turns the inbox into rows, in the order in which the model was trained to read them.
void Lane::compose_input(Session& session, const InputPlan& plan, Inbox inbox) {
  InputRows& input = session.input_;
  input.clear();
  if (session.audio_) {
    session.audio_->push(inbox.samples);
    inbox.samples.assign(static_cast<std::size_t>(plan.missing_samples), 0.0f);
    session.audio_->push(inbox.samples);
    input.frames.resize(static_cast<std::size_t>(plan.n_frames * config_.audio->n_mels));
    session.audio_->take(static_cast<std::size_t>(plan.n_frames), input.frames.data());
  }
  const auto add_bracketed = [&](std::int32_t open, const std::vector<std::int32_t>& ids,
                                 std::int32_t close) {
    if (ids.empty()) return;
    if (config_.interaction) input.add_text(open);
    for (const std::int32_t id : ids) input.add_text(id);
    if (config_.interaction) input.add_text(close);
  };
  const auto add_frames = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t f = begin; f < end; ++f)
      input.rows.push_back({RowKind::kAudio, static_cast<std::int32_t>(f)});
  };
  const InteractionConfig tokens = config_.interaction.value_or(InteractionConfig{});
  if (session.pending_token_ != kNoToken) input.add_text(session.pending_token_);
  session.pending_token_ = kNoToken;
  const std::int64_t frames_per_turn =
      plan.n_turns > 0 ? plan.n_frames / plan.n_turns : plan.n_frames;
  const std::int64_t newest = plan.n_frames - frames_per_turn;  // first frame of the newest turn
  for (std::int64_t f = 0; f < newest; f += frames_per_turn) {
    add_frames(f, f + frames_per_turn);
    input.add_text(tokens.listen);
  }
  add_bracketed(tokens.result, inbox.result, tokens.result_end);
  add_bracketed(tokens.user_text, inbox.text, tokens.user_text_end);
  for (Image& image : inbox.images) input.add_image(std::move(image));
  add_frames(newest, plan.n_frames);
}

bool Lane::is_last(std::int32_t token, const StepRequest& request, Turn& turn) const {
  const std::span<const std::int32_t> stops = turn_stops(config_);
  if (std::find(stops.begin(), stops.end(), token) != stops.end())
    turn.stopped = config_.interaction ? StopReason::kListen : StopReason::kEndOfText;
  // What a device has said by itself, it had said before anyone could look.
  const bool may_stop = turn.stopped == StopReason::kLimit && request.session->n_ahead_ == 0;
  if (may_stop && request.session->is_interrupted()) turn.stopped = StopReason::kInterrupted;
  return turn.stopped != StopReason::kLimit ||
         static_cast<std::int32_t>(turn.token_ids.size()) >= token_limit(request.max_tokens);
}

// `has_said`: the first tokens are sampled already.
void Lane::decode_turns(std::span<const StepRequest> requests, std::span<Turn> turns,
                        bool has_said) {
  std::vector<std::size_t> speaking;
  for (std::size_t i = 0; i < requests.size(); ++i)
    if (!turns[i].error && token_limit(requests[i].max_tokens) > 0) speaking.push_back(i);
  while (!speaking.empty()) {
    active_.clear();
    for (const std::size_t i : speaking) active_.push_back(requests[i].session);
    if (!has_said) score(active_);
    std::erase_if(speaking, [&](std::size_t i) { return take_tokens(requests[i], turns[i]); });
    active_.clear();
    limits_.clear();
    for (const std::size_t i : speaking) {
      Session& session = *requests[i].session;
      const auto n_left = static_cast<std::int32_t>(token_limit(requests[i].max_tokens) -
                                                    std::ssize(turns[i].token_ids));
      // The token behind the last draft must fit into the turn, and all rows into one pass.
      continue_output(session, std::min<std::int64_t>(
                                   n_left - 1, model_->max_rows() / std::ssize(speaking) - 1));
      active_.push_back(&session);
      limits_.push_back(n_left);
    }
    if (drafts_ != nullptr) drafts_->draft(active_);
    for (const std::size_t i : speaking)
      turns[i].n_drafted += static_cast<std::int64_t>(requests[i].session->input_.n_drafts);
    has_said = run_on_device(active_, turn_stops(config_));
    if (!has_said) run_rows(active_);
  }
}

bool Lane::take_tokens(const StepRequest& request, Turn& turn) {
  for (;;) {
    turn.token_ids.push_back(take_sampled(*request.session));
    if (is_last(turn.token_ids.back(), request, turn)) return true;
    if (follow_up(*request.session)) continue;
    if (!accept_draft(*request.session)) return false;
    ++turn.n_accepted;
  }
}

std::vector<std::int32_t> Lane::decode(Session& session, std::int32_t n,
                                       std::span<const std::int32_t> stop) {
  check(n >= 0, "decode: expected 0 tokens or more, found ", n);
  const Call call(*this, session);
  check(n == 0 || !session.head_row_.empty() || session.pending_token_ != kNoToken,
        "decode: the session is empty; append something first");
  // The last token waits for the next input, as one may be waiting now.
  const std::int32_t n_rows = session.pending_token_ == kNoToken ? std::max(n - 1, 0) : n;
  session.make_room(n_rows);
  std::vector<std::int32_t> tokens;
  const auto run = [&] {
    back(session, n_rows);
    decode_tokens(session, n, stop, tokens);
  };
  backend_->run_awake(std::ref(run));
  return tokens;
}

void Lane::decode_tokens(Session& session, std::int32_t n, std::span<const std::int32_t> stop,
                         std::vector<std::int32_t>& tokens) {
  Session* const only[] = {&session};
  session.input_.clear();
  for (bool is_done = n == 0; !is_done;) {
    bool has_said = false;
    if (session.pending_token_ != kNoToken) {
      const auto n_left = static_cast<std::int32_t>(n - std::ssize(tokens));
      back_ahead(session, n_left);
      continue_output(session, std::min(n_left, model_->max_rows()) - 1);
      if (drafts_ != nullptr) drafts_->draft(only);
      limits_.assign(1, n_left);
      has_said = run_on_device(only, stop);
      if (!has_said) run_rows(only);
    }
    if (!has_said) score(only);
    do {
      tokens.push_back(take_sampled(session));
      is_done = std::ssize(tokens) == n || (session.is_interrupted() && session.n_ahead_ == 0) ||
                std::find(stop.begin(), stop.end(), tokens.back()) != stop.end();
    } while (!is_done && (follow_up(session) || accept_draft(session)));
  }
  session.set_mark();
  back_ahead(session, n);
}

}  // namespace duplex
