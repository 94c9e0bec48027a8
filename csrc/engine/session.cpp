#include "engine/session.h"

#include <algorithm>
#include <string>
#include <utility>

#include "core/error.h"
#include "engine/busy_guard.h"
#include "engine/engine.h"

namespace duplex {
namespace {

// What may wait to be read. A client that feeds and never steps hears of it here.
constexpr std::size_t kMaxWaitingSamples = std::size_t{20} * 60 * kSampleRateHz;
constexpr std::size_t kMaxWaitingIds = std::size_t{1} << 20;
constexpr std::size_t kMaxWaitingImages = 256;

void check_inbox(const char* what, std::size_t waiting, std::size_t added, std::size_t limit) {
  check<CapacityError>(waiting + added <= limit, "feed: ", waiting, " ", what, " wait already and ",
                       added, " more were given; expected at most ", limit,
                       ", so step the session or append in smaller parts");
}

}  // namespace

Session::Session(std::shared_ptr<Engine> engine, Lane& lane, Sequence sequence,
                 std::optional<Speculation> speculation, const SessionOptions& options)
    : engine_(std::move(engine)),
      lane_(lane),
      sequence_(std::move(sequence)),
      endless_(options.endless),
      sampling_(options.sampling),
      speculation_(std::move(speculation)) {
  if (engine_->analyzer() != nullptr) carried_.now.audio.emplace(*engine_->analyzer());
  carried_.marks.reserve(kMarks);
  set_mark();
}

Session::~Session() { close(); }

void Session::close() {
  if (is_closed_.exchange(true) || !lane_.owner().is_here()) return;
  const std::lock_guard lock(lane_.mutex());  // waits for a step in progress
  engine_->unregister(*this);
  lane_.run_aside([this] { drop(); });
}

void Session::drop() noexcept {
  sequence_.reset();
  if (speculation_) speculation_->drafter.reset();
  is_closed_.store(true);  // last: whoever destroys the session waits for the lane until then
}

void Session::begin_call() {
  lane_.owner().check_here();
  check<SessionBusy>(!is_busy_.exchange(true),
                     "session: another call is in progress on it; one session takes one call at a "
                     "time (feed_* may be called meanwhile)");
  call_epoch_ = epoch_.load();  // what comes from here on interrupts this call
}

void Session::interrupt() {
  check_open();
  ++epoch_;
}

void Session::check_open() const {
  lane_.owner().check_here();
  check<SessionClosed>(!is_closed_.load(), "session: it is closed; open a new one");
}

std::unique_lock<std::mutex> Session::lock_open() const {
  std::unique_lock lock(lane_.mutex());
  check_open();
  return lock;
}

// ---- input from any thread

void Session::feed_audio(std::span<const float> samples) {
  check_open();
  check(engine_->analyzer() != nullptr,
        "audio: this checkpoint has no audio tower (no audio_config)");
  check_finite(samples);
  const std::lock_guard lock(inbox_mutex_);
  check_inbox("samples", inbox_.samples.size(), samples.size(), kMaxWaitingSamples);
  inbox_.samples.insert(inbox_.samples.end(), samples.begin(), samples.end());
}

void Session::feed_image(Image image) {
  check_open();
  image = check_image(engine_->config(), std::move(image));
  const std::lock_guard lock(inbox_mutex_);
  check_inbox("images", inbox_.images.size(), 1, kMaxWaitingImages);
  inbox_.images.push_back(std::move(image));
}

void Session::feed_text(std::span<const std::int32_t> ids) {
  check_open();
  check_ids(engine_->config(), ids);
  const std::lock_guard lock(inbox_mutex_);
  check_inbox("token ids", inbox_.text.size(), ids.size(), kMaxWaitingIds);
  inbox_.text.insert(inbox_.text.end(), ids.begin(), ids.end());
}

void Session::feed_result(std::span<const std::int32_t> ids) {
  check_open();
  check(engine_->config().interaction.has_value(),
        "result: this checkpoint has no interaction block, so it knows no result tokens");
  check_ids(engine_->config(), ids);
  const std::lock_guard lock(inbox_mutex_);
  check_inbox("token ids", inbox_.result.size(), ids.size(), kMaxWaitingIds);
  inbox_.result.insert(inbox_.result.end(), ids.begin(), ids.end());
}

// ---- rewinding

// The state of now, under the length of now: a call that appended nothing renews the newest mark.
void Session::set_mark() {
  auto& [now, untold, marks, next] = carried_;
  std::size_t newest = (next + kMarks - 1) % kMarks;
  if (newest >= marks.size() || marks[newest].position != sequence_->length()) {
    if (next == marks.size()) marks.emplace_back();
    newest = std::exchange(next, (next + 1) % kMarks);
  }
  Mark& mark = marks[newest];
  mark.position = sequence_->length();
  mark.n_looked_up = speculation_ ? speculation_->lookup.size() : 0;
  mark.moment = now;
}

std::vector<std::int64_t> Session::marks() const {
  const auto lock = lock_open();
  std::vector<std::int64_t> positions;
  for (const Mark& mark : carried_.marks)
    if (mark.position >= sequence_->lowest_truncation() && mark.position <= sequence_->length())
      positions.push_back(mark.position);
  std::sort(positions.begin(), positions.end());
  return positions;
}

void Session::truncate(std::int64_t position) {
  const BusyGuard busy({this});
  std::string held;
  for (const std::int64_t p : marks()) held += (held.empty() ? "" : ", ") + std::to_string(p);
  const auto lock = lock_open();
  auto& ring = carried_.marks;
  const auto found = std::ranges::find(ring, position, &Mark::position);
  check(found != ring.end() && position >= sequence_->lowest_truncation(),
        "truncate: expected the end of an earlier call (one of ", held, "), found ", position);
  sequence_->truncate(position);
  // Marks of what was dropped would be mistaken for marks of what comes instead.
  for (Mark& other : ring)
    if (other.position > position) other.position = -1;
  carried_.next_mark = (static_cast<std::size_t>(found - ring.begin()) + 1) % kMarks;
  carried_.now = found->moment;
  ++epoch_;
  if (speculation_) speculation_->lookup.truncate(found->n_looked_up);
  if (drafter() != nullptr) drafter()->truncate(position);
}

std::shared_ptr<Session> Session::fork(std::int64_t max_positions, LaneKind lane) {
  check(max_positions >= 0, "max_positions: expected a positive number, found ", max_positions);
  const BusyGuard busy({this});
  auto lock = lock_open();
  std::optional<Endless> endless = endless_;
  if (endless && max_positions > 0)
    endless = endless->with_limit(max_positions, sequence_->layout());
  if (endless) max_positions = endless->held_positions(sequence_->layout());
  if (max_positions == 0) max_positions = sequence_->max_positions();
  std::optional<Sequence> sequence;
  std::optional<Speculation> speculation;
  lane_.run_aside([&] {
    sequence = sequence_->fork(max_positions);
    if (speculation_)
      speculation =
          speculation_->fork(endless ? endless->max_positions : max_positions, sequence_->length());
  });
  // A child that cannot be finished closes itself, under the lock of its lane.
  lock.unlock();
  auto child = engine_->adopt(std::move(*sequence), std::move(speculation),
                              {.sampling = sampling_, .lane = lane, .endless = endless});
  child->go_on(carried_, epoch());
  const std::lock_guard inbox_lock(inbox_mutex_);
  child->inbox_ = inbox_;
  return child;
}

PositionRange Session::forget(std::int64_t begin, std::int64_t end) {
  const BusyGuard busy({this});
  const auto lock = lock_open();
  if (endless_) endless_->check_forget(*sequence_, begin, end);
  return hide(begin, end);
}

PositionRange Session::hide(std::int64_t begin, std::int64_t end) {
  const PositionRange forgotten = sequence_->forget(begin, end);
  if (drafter() != nullptr) drafter()->restart(sequence_->length());
  return forgotten;
}

// The hole grows at its end, so what no turn has told is one range.
void Session::make_room(std::int64_t n_rows) {
  PositionRange forgotten;
  if (endless_) forgotten = endless_->to_forget(*sequence_, n_rows);
  if (!forgotten.is_empty()) {
    hide(forgotten.begin, forgotten.end);
    PositionRange& untold = carried_.untold;
    if (!untold.is_empty()) forgotten.begin = std::min(untold.begin, forgotten.begin);
    untold = forgotten;
  }
  sequence_->check_room(n_rows);
}

void Session::set_sampling(const SamplingParams& params) {
  params.validate();
  const BusyGuard busy({this});
  check_open();
  sampling_ = params;
}

std::int64_t Session::length() const {
  const auto lock = lock_open();
  return sequence_->length();
}

std::vector<PositionRange> Session::forgotten() const {
  const auto lock = lock_open();
  const auto holes = sequence_->forgotten();
  return {holes.begin(), holes.end()};
}

std::int64_t Session::max_positions() const {
  const auto lock = lock_open();
  return endless_ ? endless_->max_positions : sequence_->max_positions();
}

SequenceUsage Session::usage() const {
  const auto lock = lock_open();
  return sequence_->usage();
}

std::int64_t Session::draft_bytes() const {
  const auto lock = lock_open();
  return speculation_ && speculation_->drafter ? speculation_->drafter->held_bytes() : 0;
}

std::vector<std::tuple<std::int32_t, std::int64_t, std::uint64_t>> Session::digests() const {
  const auto lock = lock_open();
  std::vector<std::tuple<std::int32_t, std::int64_t, std::uint64_t>> digests;
  for (const BlockDigest& digest : sequence_->digests())
    digests.emplace_back(digest.tape, digest.block, digest.hash);
  return digests;
}

}  // namespace duplex
