// The table of encoders: how each kind of input becomes rows of the sequence.
//
// A new encoder is its own pair of files here, a twin of the same name in duplex_engine/reference/
// and one row below; python_tests/ walks the table and fails on a row without a twin.
#pragma once

#include <array>

namespace duplex {

inline constexpr std::array kEncoders = {
    "dmel",  // 50 ms of 16 kHz sound
    "hmlp",  // one patch of a picture
};

}  // namespace duplex
