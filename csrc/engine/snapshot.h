// A session in bytes, and a session from them: another engine with the same weights goes on bit for
// bit, in this process or in another.
//
// First comes the state, in one piece of less than a few megabytes: all that a Session carries
// beside its tapes. Then come the blocks of the tapes, piece by piece, so that a long session needs
// no second copy in memory. What encloses both in a file, and makes sure that it is whole and of
// the right model, is the caller's business. What multi-token-prediction layers remember is left
// out: their tapes start afresh, and output never depends on them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>

#include "engine/engine.h"

namespace duplex {

struct SnapshotWriter {
  // Called once, before the blocks.
  std::function<void(std::span<const std::byte> state, std::int64_t block_bytes)> begin;
  std::function<void(std::span<const std::byte> piece)> write;
};
// Fills the span with the blocks' bytes that follow.
using SnapshotReader = std::function<void(std::span<std::byte> piece)>;

// The session is busy meanwhile, others are not held up. What is fed meanwhile is not part of the
// snapshot. Throws SessionBusy, SessionClosed, and what the writer throws.
void write_snapshot(Session& session, const SnapshotWriter& writer);

// A session that goes on from the state. `max_positions` 0 takes those of the state. Throws
// CheckpointError where state and engine do not fit, CapacityError with what would fit, and what
// the reader throws; the engine is then as it was.
std::shared_ptr<Session> read_snapshot(Engine& engine, std::span<const std::byte> state,
                                       const SnapshotReader& read, std::int64_t max_positions);

// The same without a file between: a session of `engine` that goes on where `session` is, which
// stays open and as it was. What is fed to that one meanwhile is not taken along.
std::shared_ptr<Session> copy_session(Session& session, Engine& engine);

}  // namespace duplex
