// Several GPUs at once: what one rank after another would never show.
//
// A stream is a program that launches kernels through the twin's Runtime; as in a stream, a launch
// begins when the one before has ended. Thread blocks of all streams run in turn, a piece at a
// time; which one, and which stores happen between two pieces, is random, and now and then a stream
// stands still for long, so that it comes late. What kernels see of each other: system_memory.h.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace duplex::simt {

// Throws what a kernel or a program throws; all of it is dropped then, where it stands. A program
// has a small stack, and must not launch before and after an exception.
void run_streams(const std::vector<std::function<void()>>& programs, std::uint32_t seed);

}  // namespace duplex::simt
