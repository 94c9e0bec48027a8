#include "tests/simt/warp.h"

#include <cstring>
#include <stdexcept>
#include <string>

#include "core/types.h"

namespace duplex::simt {
namespace {

// The lane that `lane` reads, by the rules of PTX's shfl: a lane behind the group gives way to the
// reader itself, one before the group does not.
int source_lane(Wait kind, int lane, int argument, int width) {
  const int first = lane / width * width, last = first + width - 1;
  if (kind == Wait::kShuffleFrom) return first + (argument & (width - 1));
  const int bits = argument & (kWarpLanes - 1);
  const int source = kind == Wait::kShuffleXor ? lane ^ bits : lane + bits;
  return source > last ? lane : source;
}

void shuffle_lanes(Wait kind, Exchange* const* lanes) {
  float values[kWarpLanes];
  for (int lane = 0; lane < kWarpLanes; ++lane) values[lane] = lanes[lane]->value;
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    const int width = lanes[lane]->width;
    if (width < 1 || width > kWarpLanes || (width & (width - 1)) != 0)
      throw std::logic_error("shuffle: expected a width of 1, 2, 4, 8, 16 or 32, found " +
                             std::to_string(width));
    lanes[lane]->value = values[source_lane(kind, lane, lanes[lane]->argument, width)];
  }
}

float low(std::uint32_t pair) { return bf16_to_float(static_cast<std::uint16_t>(pair)); }
float high(std::uint32_t pair) { return bf16_to_float(static_cast<std::uint16_t>(pair >> 16)); }

// In float32, one product after another. note: the machine adds in an order of its own.
void multiply_lanes(Exchange* const* lanes) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    const Exchange& own = *lanes[lane];
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      const int k = 2 * t + 8 * half;
      for (int below = 0; below < 2; ++below) {
        a[g + 8 * below][k] = low(own.a[2 * half + below]);
        a[g + 8 * below][k + 1] = high(own.a[2 * half + below]);
      }
      b[k][g] = low(own.b[half]);
      b[k + 1][g] = high(own.b[half]);
    }
  }
  for (int row = 0; row < 16; ++row) {
    float sum[8];
    for (int column = 0; column < 8; ++column)
      sum[column] = lanes[row % 8 * 4 + column / 2]->acc[row / 8 * 2 + column % 2];
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < 8; ++column) sum[column] += a[row][k] * b[k][column];
    for (int column = 0; column < 8; ++column)
      lanes[row % 8 * 4 + column / 2]->acc[row / 8 * 2 + column % 2] = sum[column];
  }
}

int value_of(std::uint8_t code, bool is_unsigned) {
  return is_unsigned ? code : static_cast<std::int8_t>(code);
}

// The same in int8, where order does not matter: a (16, 32), b (32, 8).
void multiply_integer_lanes(Exchange* const* lanes) {
  const bool a_unsigned = lanes[0]->codes == Unsigned::kLeft;
  const bool b_unsigned = lanes[0]->codes == Unsigned::kRight;
  std::uint8_t a[16][32], b[8][32];
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    const Exchange& own = *lanes[lane];
    const int g = lane / 4, k = lane % 4 * 4;
    for (int i = 0; i < 4; ++i) std::memcpy(&a[g + i % 2 * 8][k + i / 2 * 16], &own.a[i], 4);
    for (int i = 0; i < 2; ++i) std::memcpy(&b[g][k + i * 16], &own.b[i], 4);
  }
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      std::int32_t sum = 0;
      for (int k = 0; k < 32; ++k)
        sum += value_of(a[row][k], a_unsigned) * value_of(b[column][k], b_unsigned);
      lanes[row % 8 * 4 + column / 2]->integer_acc[row / 8 * 2 + column % 2] += sum;
    }
}

}  // namespace

void exchange_lanes(Wait kind, Exchange* const* lanes) {
  if (kind == Wait::kProduct)
    multiply_lanes(lanes);
  else if (kind == Wait::kIntegerProduct)
    multiply_integer_lanes(lanes);
  else
    shuffle_lanes(kind, lanes);
}

}  // namespace duplex::simt
