#include "kernels_avx512.h"

#include <immintrin.h>

#include <algorithm>
#include <type_traits>
#include <utility>

namespace duplex_bench {
namespace {

// Calls fn(0), fn(1), ... with constants, so that arrays so indexed live in registers. (The unroll
// pragma comes too late for that: gcc 12 then stores every sum in every step.)
template <int kN, class Fn>
[[gnu::always_inline]] inline void unrolled(const Fn& fn) {
  [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) __attribute__((always_inline)) {
    (fn(std::integral_constant<int, kIndex>()), ...);
  }(std::make_integer_sequence<int, kN>());
}

// note: with the intrinsic gcc 12 copies and stores every integer sum in every step.
[[gnu::always_inline]] inline __m512i dot_bytes(__m512i sum, __m512i is_unsigned,
                                                __m512i is_signed) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(is_unsigned), "v"(is_signed));
  return sum;
}

constexpr int kVectors = 4;
constexpr std::int64_t kAheadBytes = 4096;  // of what is read through
constexpr std::int64_t kPieceSteps = 32;

struct BF16Step {
  static constexpr int kWords = 1;  // 32-bit words of x that one step consumes
  using Sum = __m512;
  static Sum zero() { return _mm512_setzero_ps(); }
  static __m512i weights(__m512i raw, int) { return raw; }
  static Sum dot(Sum sum, __m512i w, __m512i x) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x));
  }
  static __m512 result(Sum sum) { return sum; }
};

struct Int8Step {
  static constexpr int kWords = 1;
  using Sum = __m512i;
  static Sum zero() { return _mm512_setzero_si512(); }
  static __m512i weights(__m512i raw, int) { return raw; }
  static Sum dot(Sum sum, __m512i w, __m512i x) { return dot_bytes(sum, x, w); }
  static __m512 result(Sum sum) { return _mm512_cvtepi32_ps(sum); }
};

// The low nibbles of the step's bytes meet the first word of x, the high ones the second.
struct Int4Step {
  static constexpr int kWords = 2;
  using Sum = __m512i;
  static Sum zero() { return _mm512_setzero_si512(); }
  static __m512i weights(__m512i raw, int word) {
    const __m512i mask = _mm512_set1_epi8(0x0f);
    return _mm512_and_si512(word == 0 ? raw : _mm512_srli_epi16(raw, 4), mask);
  }
  static Sum dot(Sum sum, __m512i w, __m512i x) { return dot_bytes(sum, w, x); }
  static __m512 result(Sum sum) { return _mm512_cvtepi32_ps(sum); }
};

// Steps of a panel that a tile multiplies, and which lines it asks for: `lines` of them per step.
struct Piece {
  const std::byte* panel;
  std::int64_t first_step;
  std::int64_t n_steps;
  const std::byte* ahead;
  int lines;
};

// `sums` (rows, 64) are of the steps before.
template <class Step, int kRows>
void multiply_tile(Piece piece, const std::uint32_t* x, typename Step::Sum* kept) {
  typename Step::Sum sums[kRows * kVectors];
  unrolled<kRows * kVectors>(
      [&](auto i) { sums[i] = piece.first_step == 0 ? Step::zero() : kept[i]; });
  const std::byte* panel = piece.panel + piece.first_step * kStepBytes;
  x += piece.first_step * Step::kWords * kRows;
  for (std::int64_t step = 0; step < piece.n_steps; ++step, panel += kStepBytes) {
    for (int line = 0; line < piece.lines; ++line, piece.ahead += 64)
      _mm_prefetch(reinterpret_cast<const char*>(piece.ahead), _MM_HINT_T0);
    unrolled<Step::kWords>([&](auto word) {
      __m512i w[kVectors];
      unrolled<kVectors>(
          [&](auto v) { w[v] = Step::weights(_mm512_load_si512(panel + 64 * v), word); });
      unrolled<kRows>([&](auto row) {
        const __m512i input = _mm512_set1_epi32(static_cast<int>(x[word * kRows + row]));
        unrolled<kVectors>([&](auto v) {
          sums[row * kVectors + v] = Step::dot(sums[row * kVectors + v], w[v], input);
        });
      });
    });
    x += Step::kWords * kRows;
  }
  unrolled<kRows * kVectors>([&](auto i) { kept[i] = sums[i]; });
}

template <class Step>
void multiply_rows(int n_rows, const Piece& piece, const std::uint32_t* x,
                   typename Step::Sum* sums) {
  switch (n_rows) {
    case 1:
      return multiply_tile<Step, 1>(piece, x, sums);
    case 2:
      return multiply_tile<Step, 2>(piece, x, sums);
    case 3:
      return multiply_tile<Step, 3>(piece, x, sums);
    case 4:
      return multiply_tile<Step, 4>(piece, x, sums);
    case 5:
      return multiply_tile<Step, 5>(piece, x, sums);
    default:
      return multiply_tile<Step, 6>(piece, x, sums);
  }
}

// Groups of rows of nearly one size take turns at a piece of the panel, which stays in the
// first-level cache, and ask for the piece behind it: memory is never idle.
template <class Step>
void multiply_groups(const PanelWork& work) {
  const int n_groups = (work.n_rows + kMaxTileRows - 1) / kMaxTileRows;
  const std::int64_t most = n_groups == 1 ? work.n_steps : kPieceSteps;
  typename Step::Sum sums[kMaxRows * kVectors];
  for (std::int64_t step = 0; step < work.n_steps; step += most) {
    Piece piece{work.panel, step, std::min(most, work.n_steps - step), nullptr, 0};
    piece.ahead = work.panel + (n_groups == 1 ? kAheadBytes : (step + most) * kStepBytes);
    int row = 0;
    for (int group = 0; group < n_groups; ++group) {
      const int n_rows = work.n_rows / n_groups + (group < work.n_rows % n_groups ? 1 : 0);
      const int wanted = (kVectors + n_groups - 1) / n_groups;
      piece.lines = std::max(0, std::min(wanted, kVectors - group * wanted));
      multiply_rows<Step>(n_rows, piece, work.x + row * work.max_words, sums + row * kVectors);
      piece.ahead += 64 * piece.lines * piece.n_steps;
      row += n_rows;
    }
  }
  for (int i = 0; i < work.n_rows * kVectors; ++i)
    _mm512_storeu_ps(work.y + 16 * i, Step::result(sums[i]));
}

template <class Multiply>
double spin(std::int64_t n_loops, double operations, Multiply multiply) {
  constexpr int kSums = 12;
  __m512i sums[kSums];
  unrolled<kSums>([&](auto i) { sums[i] = _mm512_set1_epi32(0x3c003c00 + i); });
  const __m512i a = _mm512_set1_epi32(0x3c013c01), b = _mm512_set1_epi32(0x3c023c02);
  for (std::int64_t loop = 0; loop < n_loops; ++loop) {
    unrolled<kSums>([&](auto i) {
      sums[i] = multiply(sums[i], a, b);
      asm volatile("" : "+v"(sums[i]));  // the compiler may not drop or merge loops
    });
  }
  return static_cast<double>(n_loops) * kSums * operations;
}

}  // namespace

bool machine_has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
}

void multiply_panel(Format format, const PanelWork& work) {
  switch (format) {
    case Format::kBF16:
      return multiply_groups<BF16Step>(work);
    case Format::kInt8:
      return multiply_groups<Int8Step>(work);
    case Format::kInt4:
      return multiply_groups<Int4Step>(work);
  }
}

void read_bytes(const std::byte* data, std::size_t bytes) {
  __m512i sums[kVectors];
  unrolled<kVectors>([&](auto v) { sums[v] = _mm512_setzero_si512(); });
  for (std::size_t i = 0; i + 256 <= bytes; i += 256)
    unrolled<kVectors>([&](auto v) {
      const std::byte* line = data + i + 64 * v;
      _mm_prefetch(reinterpret_cast<const char*>(line + kAheadBytes), _MM_HINT_T1);
      sums[v] = _mm512_or_si512(sums[v], _mm512_loadu_si512(line));
    });
  unrolled<kVectors>([&](auto v) { asm volatile("" : "+v"(sums[v])); });
}

double spin_dots(Dot dot, std::int64_t n_loops) {
  switch (dot) {
    case Dot::kF32:
      return spin(n_loops, 2 * 16, [](__m512i sum, __m512i a, __m512i b) {
        return _mm512_castps_si512(_mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b),
                                                   _mm512_castsi512_ps(sum)));
      });
    case Dot::kBF16:
      return spin(n_loops, 2 * 32, [](__m512i sum, __m512i a, __m512i b) {
        return _mm512_castps_si512(_mm512_dpbf16_ps(_mm512_castsi512_ps(sum),
                                                    reinterpret_cast<__m512bh>(a),
                                                    reinterpret_cast<__m512bh>(b)));
      });
    case Dot::kInt8:
      return spin(n_loops, 2 * 64,
                  [](__m512i sum, __m512i a, __m512i b) { return dot_bytes(sum, a, b); });
  }
  return 0;
}

}  // namespace duplex_bench
