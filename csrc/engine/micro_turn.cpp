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

}  // namespace

std::vector<Turn> Lane::step(std::span<const StepRequest> requests) {
  std::vector<Session*> sessions;
  for (const StepRequest& request : requests) sessions.push_back(request.session);
  const BusyGuard busy(std::move(sessions));
  const std::lock_guard lock(mutex());
  check_open();
  std::vector<Turn> turns(requests.size());
  const auto run = [&] { run_turns(requests, turns); };
  backend_->run_awake(std::ref(run));
  return turns;
}

void Lane::run_turns(std::span<const StepRequest> requests, std::span<Turn> turns) {
  TurnTiming timing;
  auto last = std::chrono::steady_clock::now();
  const auto lap_us = [&last] {
    const auto lap = std::chrono::steady_clock::now() - last;
    last += lap;
    return std::chrono::duration_cast<std::chrono::microseconds>(lap).count();
  };

  // What each session heard, saw and was told since its last turn becomes rows.
  if (calls_.size() < requests.size()) calls_.resize(requests.size());
  active_.clear();
  for (std::size_t i = 0; i < requests.size(); ++i) {
    Call& call = calls_[i];
    call.begin(*requests[i].session, &turns[i], token_limit(requests[i].max_tokens));
    try {
      begin_turn(call);
      active_.push_back(&call);
    } catch (const Error&) {
      turns[i].error = std::current_exception();
    }
  }
  timing.encode_us = lap_us();

  // The rows of all sessions go through the model together. A device may go on with what they say.
  const std::span<const std::int32_t> stops = turn_stops(config_);
  const bool has_said = run_on_device(stops);
  if (!has_said) run_rows();
  timing.append_us = lap_us();

  // Every session that has more to say says it, one token a pass, or several where drafts hold.
  decode_turns(stops, has_said);
  timing.decode_us = lap_us();
  timing.total_us = timing.encode_us + timing.append_us + timing.decode_us;

  for (std::size_t i = 0; i < requests.size(); ++i) {
    if (turns[i].error) continue;
    Session& session = *calls_[i].session;
    session.set_mark();
    turns[i].timing = timing;
    turns[i].position = session.sequence().length();
    back_ahead(session, turns[i].n_rows + calls_[i].limit);
    turns[i].kv_bytes = session.sequence().held_bytes();
    if (Drafter* const drafter = session.drafter()) turns[i].kv_bytes += drafter->held_bytes();
  }
}

std::int32_t Lane::token_limit(std::int32_t max_tokens) const {
  if (max_tokens >= 0) return max_tokens;
  return config_.interaction ? std::max(config_.interaction->max_output_tokens, 1) : kDefaultTokens;
}

void Lane::begin_turn(Call& call) {
  Session& session = *call.session;
  Turn& turn = *call.turn;
  session.check_open();
  // In one piece: what another thread feeds from here on belongs to the next turn.
  auto inbox_lock = session.lock_inbox();
  const std::int64_t n_output = std::max(call.limit - 1, 0);
  const InputPlan plan = plan_input(session, n_output);
  check(plan.n_rows > 0 || call.limit == 0 || !session.now().head_row.empty(),
        "step: nothing was fed and the session is empty; feed audio, an image or text first");
  const std::int64_t n_rows = plan.n_rows + n_output;
  session.make_room(n_rows);
  back(session, n_rows);
  turn.forgotten = std::exchange(session.carried().untold, {});
  Inbox inbox = std::exchange(session.inbox(), {});
  inbox_lock.unlock();
  compose_input(call, plan, std::move(inbox));
  session.now().turn += std::max<std::int64_t>(plan.n_turns, 1);
  turn.turn = session.now().turn;
  turn.epoch = session.call_epoch();
  turn.n_rows = plan.n_rows;
  turn.merged_turns = std::max<std::int64_t>(plan.n_turns - 1, 0);
  turn.missing_samples = plan.missing_samples;
}

// Of an endless session, sound beyond what there is room for, with `n_output` rows more, waits for
// the next turn: it could never be taken otherwise.
InputPlan Lane::plan_input(Session& session, std::int64_t n_output) const {
  InputPlan plan;
  const Inbox& inbox = session.inbox();
  const auto bracketed = [&](const std::vector<std::int32_t>& ids) {
    const std::int64_t brackets = config_.interaction ? 2 : 0;
    return ids.empty() ? 0 : static_cast<std::int64_t>(ids.size()) + brackets;
  };
  plan.n_rows = (session.now().pending_token != kNoToken ? 1 : 0) + bracketed(inbox.result) +
                bracketed(inbox.text);
  for (const Image& image : inbox.images) plan.n_rows += image.n_patches;
  const std::optional<DmelStream>& audio = session.now().audio;
  if (!audio) return plan;
  const std::int64_t room =
      session.endless() ? session.endless()->room(session.sequence()) - plan.n_rows - n_output
                        : std::numeric_limits<std::int64_t>::max() - 1;
  const std::int64_t n_samples = static_cast<std::int64_t>(audio->frames_ready()) * kHopSamples +
                                 audio->state().n_partial +
                                 static_cast<std::int64_t>(inbox.samples.size());
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
void Lane::compose_input(Call& call, const InputPlan& plan, Inbox inbox) {
  Moment& now = call.session->now();
  InputRows& input = call.input;
  if (now.audio) {
    now.audio->push(inbox.samples);
    inbox.samples.assign(static_cast<std::size_t>(plan.missing_samples), 0.0f);
    now.audio->push(inbox.samples);
    input.frames.resize(static_cast<std::size_t>(plan.n_frames * config_.audio->n_mels));
    now.audio->take(static_cast<std::size_t>(plan.n_frames), input.frames.data());
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
  if (now.pending_token != kNoToken) input.add_text(now.pending_token);
  now.pending_token = kNoToken;
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

void Lane::decode_turns(std::span<const std::int32_t> stops, bool has_said) {
  std::erase_if(active_, [](const Call* call) { return call->limit == 0; });
  while (!active_.empty()) {
    if (!has_said) score();
    std::erase_if(active_, [&](Call* call) { return take_tokens(*call, stops); });
    has_said = append_output(stops);
  }
}

bool Lane::append_output(std::span<const std::int32_t> stops) {
  for (Call* call : active_)
    // The token behind the last draft must fit into the turn, and all rows into one pass.
    continue_output(*call, std::min<std::int64_t>(call->n_left() - 1,
                                                  model_->max_rows() / std::ssize(active_) - 1));
  if (drafts_ != nullptr) drafts_->draft(active_);
  for (Call* call : active_)
    call->turn->n_drafted += static_cast<std::int64_t>(call->input.n_drafts);
  const bool has_said = run_on_device(stops);
  if (!has_said) run_rows();
  return has_said;
}

bool Lane::take_tokens(Call& call, std::span<const std::int32_t> stops) {
  Turn& turn = *call.turn;
  for (;;) {
    const std::int32_t token = tokens_[call.sampled_row];
    call.session->now().pending_token = token;
    turn.token_ids.push_back(token);
    if (std::ranges::count(stops, token) > 0)
      turn.stopped = config_.interaction ? StopReason::kListen : StopReason::kEndOfText;
    else if (call.session->is_interrupted() && call.n_ahead == 0)
      // What a device has said by itself, it had said before anyone could look.
      turn.stopped = StopReason::kInterrupted;
    if (turn.stopped != StopReason::kLimit || call.n_left() <= 0) return true;
    if (call.n_ahead > 0) {
      --call.n_ahead;
      keep_sampled(call);
    } else if (accept_draft(call)) {
      ++turn.n_accepted;
    } else {
      return false;
    }
  }
}

// As the output of a turn, behind the token that waits, if one does.
std::vector<std::int32_t> Lane::decode(Session& session, std::int32_t n,
                                       std::span<const std::int32_t> stops) {
  check(n >= 0, "decode: expected 0 tokens or more, found ", n);
  const Hold hold(*this, session);
  const bool has_pending = session.now().pending_token != kNoToken;
  check(n == 0 || !session.now().head_row.empty() || has_pending,
        "decode: the session is empty; append something first");
  const std::int32_t n_rows = has_pending ? n : std::max(n - 1, 0);  // the last token waits too
  session.make_room(n_rows);
  Turn turn;
  const auto run = [&] {
    back(session, n_rows);
    hold.call.begin(session, &turn, n);
    const bool has_said = has_pending && n > 0 && append_output(stops);
    decode_turns(stops, has_said);
    session.set_mark();
    back_ahead(session, n);
  };
  backend_->run_awake(std::ref(run));
  return std::move(turn.token_ids);
}

}  // namespace duplex
