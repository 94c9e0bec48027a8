// The table of encoders: how each kind of input becomes rows of the sequence.
//
// A new encoder is its own pair of files here, a twin of the same name in duplex_engine/reference/
// and one row below; python_tests/ walks the table and fails on a row without a twin.
#pragma once

#include <array>

namespace duplex {

struct EncoderInfo {
  const char* name;           // of its files here and of its reference module
  const char* input;          // what one row of the sequence holds
  const char* tensor_prefix;  // of its weights in a checkpoint
};

inline constexpr std::array<EncoderInfo, 2> kEncoders = {{
    {"dmel", "50 ms of 16 kHz sound", "model.audio."},
    {"hmlp", "one patch of a picture", "model.visual."},
}};

}  // namespace duplex
