// States of sessions that no session wrote: each field is looked at before it is used, and what is
// refused leaves nothing behind. That streams go on elsewhere: python_tests/engine/test_resume.py.
#include "engine/snapshot.h"

#include <catch2/catch.hpp>
#include <cmath>
#include <functional>
#include <optional>

#include "core/byte_stream.h"
#include "sequence/snapshot.h"
#include "tests/engine/fixtures.h"

namespace duplex::engine_tests {
namespace {

struct AudioFields {
  std::int32_t n_partial = 0;
  std::vector<float> samples = std::vector<float>(kWindowSamples);
  std::vector<std::uint8_t> waiting;

  void write(ByteWriter& to) const {
    to.put(n_partial);
    to.put_all(samples);
    to.put_all(waiting);
  }
};

struct MarkFields {
  std::int64_t position = 0;
  std::int32_t pending_token = kNoToken;
  std::int64_t n_looked_up = 0;
  std::vector<std::byte> head_row;
  AudioFields audio;

  void write(ByteWriter& to) const {
    to.put(position);
    to.put(std::int64_t{0});  // turn
    to.put(pending_token);
    to.put(n_looked_up);
    to.put_all(head_row);
    audio.write(to);
  }
};

// Of a session that has heard nothing and drafts, as engine/snapshot.cpp writes them.
struct Fields {
  std::optional<Endless> endless;
  SequenceState sequence{2000, 0, 0, 0, 0, {}};
  std::int32_t max_drafts = 4;
  float temperature = 0;
  std::uint8_t has_audio = 1;
  AudioFields audio;
  std::int32_t pending_token = kNoToken;
  std::vector<std::byte> head_row;
  std::int32_t n_drafts = 4;
  std::int64_t n_ids = 3;
  std::vector<std::int32_t> ids = {9, 10, 11};
  std::uint64_t next_mark = 1;
  std::vector<MarkFields> marks = std::vector<MarkFields>(1);
  std::int32_t height = 4, width = 4;
  std::size_t pixel_bytes = 48;
  std::size_t bytes_more = 0;

  ByteWriter bytes() const {
    ByteWriter to;
    to.put(endless.has_value());
    if (endless) {
      to.put(endless->head);
      to.put(endless->recent);
      to.put(endless->is_automatic);
    }
    sequence.write(to);
    to.put(max_drafts);
    to.put(std::uint64_t{1});  // sampling: seed, temperature, top_k, top_p
    to.put(temperature);
    to.put(std::int32_t{0});
    to.put(1.0f);
    to.put(false);  // background
    to.put(has_audio);
    audio.write(to);
    for (int i = 0; i < 4; ++i) to.put(std::int64_t{0});  // untold, turn, epoch
    to.put(pending_token);
    to.put_all(head_row);
    to.put(n_drafts);
    to.put(n_ids);
    to.put_all(ids);
    to.put(next_mark);
    to.put(static_cast<std::uint64_t>(marks.size()));
    for (const MarkFields& mark : marks) mark.write(to);
    to.put_all(std::span<const float>());  // inbox: samples, text, result, one picture
    to.put_all(std::span<const std::int32_t>());
    to.put_all(std::span<const std::int32_t>());
    to.put(std::uint64_t{1});
    to.put(height);
    to.put(width);
    to.put_all(std::vector<std::uint8_t>(pixel_bytes));
    for (std::size_t i = 0; i < bytes_more; ++i) to.put(std::uint8_t{0});
    return to;
  }
};

std::shared_ptr<Session> restore(Engine& engine, const Fields& fields) {
  const ByteWriter state = fields.bytes();
  return read_snapshot(engine, state.bytes(), [](std::span<std::byte>) {}, 0);
}

TEST_CASE("a state that could be a session's becomes one") {
  const auto engine = make_engine();
  Fields fields;
  fields.n_drafts = 1 << 20;  // taken for as many as there may be
  MarkFields dropped;
  dropped.position = -1;
  dropped.n_looked_up = 1 << 20;
  fields.marks.push_back(dropped);
  fields.next_mark = 2;
  const auto session = restore(*engine, fields);
  CHECK(session->marks() == std::vector<std::int64_t>{0});
  const std::vector<std::int32_t> song(12, 9);
  session->lane().append_text(*session, song, LogitsWanted::kNone);
  CHECK(session->lane().decode(*session, 100, {}).size() == 100);
  for (int turn = 0; turn < 40; ++turn) hear(*session, turn);
  CHECK(session->marks().size() > 1);
  CHECK(throws<SessionClosed>([&] {
    engine->close();
    restore(*engine, {});
  }));
}

TEST_CASE("a state that no session has is refused, field by field") {
  const std::pair<const char*, std::function<void(Fields&)>> faults[] = {
      {"endless", [](Fields& f) { f.endless = {-1, 500}; }},
      {"endless", [](Fields& f) { f.endless = {0, 2}; }},
      {"max_positions", [](Fields& f) { f.sequence.max_positions = 0; }},
      {"drafts", [](Fields& f) { f.max_drafts = kMaxDrafts + 1; }},
      {"drafts", [](Fields& f) { f.max_drafts = -1; }},
      {"temperature", [](Fields& f) { f.temperature = NAN; }},
      {"hears", [](Fields& f) { f.has_audio = 0; }},
      {"bool", [](Fields& f) { f.has_audio = 2; }},
      {"samples", [](Fields& f) { f.audio.samples.pop_back(); }},
      {"partial", [](Fields& f) { f.audio.n_partial = kHopSamples; }},
      {"token", [](Fields& f) { f.pending_token = kNoToken - 1; }},
      {"token", [](Fields& f) { f.pending_token = streaming_config().vocab_size; }},
      {"row", [](Fields& f) { f.head_row.resize(1); }},
      {"ids", [](Fields& f) { f.n_ids = 2; }},
      {"ids", [](Fields& f) { f.n_ids = -1; }},
      {"ids", [](Fields& f) { f.ids.assign(static_cast<std::size_t>(f.n_ids = 8193), 9); }},
      {"id", [](Fields& f) { f.ids[1] = streaming_config().vocab_size; }},
      {"marks", [](Fields& f) { f.marks.clear(); }},
      {"marks", [](Fields& f) { f.marks.clear(), f.next_mark = 0; }},
      {"marks", [](Fields& f) { f.marks.resize(33); }},
      {"marks", [](Fields& f) { f.next_mark = 2; }},
      {"marks", [](Fields& f) { f.marks.resize(32), f.next_mark = 32; }},
      {"mark", [](Fields& f) { f.marks[0].n_looked_up = 4; }},
      {"mark", [](Fields& f) { f.marks[0].n_looked_up = -1; }},
      {"mark's token", [](Fields& f) { f.marks[0].pending_token = 1 << 20; }},
      {"mark's row", [](Fields& f) { f.marks[0].head_row.resize(3); }},
      {"mark's sound", [](Fields& f) { f.marks[0].audio.samples[5] = INFINITY; }},
      {"image", [](Fields& f) { f.height = 5; }},
      {"image", [](Fields& f) { f.pixel_bytes = 49; }},
      {"image", [](Fields& f) { f.height = 0; }},
      {"end", [](Fields& f) { f.bytes_more = 1; }},
  };
  const auto engine = make_engine();
  CHECK_NOTHROW(restore(*engine, {}));
  for (const auto& [name, spoil] : faults) {
    CAPTURE(name);
    Fields fields;
    spoil(fields);
    CHECK_THROWS_AS(restore(*engine, fields), CheckpointError);
    CHECK(is_empty(engine->stats()));
  }
}

}  // namespace
}  // namespace duplex::engine_tests
