// Sums over ranks: with the convolution, residual and norm that follow them, and alone. Sums are
// taken by ascending rank, and what follows is the arithmetic of conv_add_norm_kernel, so one
// exchange, two, and reduce-scatter with all-gather give the same bits.
#include <algorithm>

#include "core/error.h"
#include "kernels/all_reduce.h"
#include "kernels/exchange.cuh"
#include "kernels/exchange_launch.h"
#include "kernels/norm.cuh"

namespace duplex::cuda {
namespace {

// One short row: its parts come into one multiprocessor sooner than sums come from others.
constexpr bool is_direct_sum(std::int64_t n_ranks, std::int64_t n_rows, std::int64_t n_words) {
  constexpr std::int64_t kMostBytes = 32 << 10;
  return n_rows == 1 && n_ranks * n_words * kWordBytes <= kMostBytes;
}

// A word of some rows: as many as a convolution has taps.
constexpr int kRowsAtOnce = 4;
using SomeRows = Four[kRowsAtOnce];
DUPLEX_DEVICE std::int32_t up_to(std::int32_t last, std::int32_t row) {
  return row < last ? row : last;
}

// Four columns of the sums, convolved, plus the sums themselves; these are left on the tape.
// sums_at(first, word, sums) waits for a word of kRowsAtOnce rows of the batch, the last once more
// where there are fewer. Older rows come from the tape, and first, while the others are on their
// way.
template <class SumsAt>
DUPLEX_DEVICE Four convolve(const ConvAddNormArgs& op, const Segment& segment, std::int32_t row,
                            std::int64_t word, const SumsAt& sums_at) {
  const std::int32_t in_segment = row - segment.row_begin;
  const auto tape = [&](std::int64_t at) {
    return reinterpret_cast<float*>(segment.conv.block(at) + op.conv.offset_bytes);
  };
  const auto weight = [&](std::int32_t back) {
    return load_word(op.conv.weight + (op.kernel - 1 - back) * std::int64_t{op.conv.channels},
                     word);
  };
  Four sum{}, x{};
  const auto add = [&](const Four& by) {
    for (int i = 0; i < 4; ++i) sum.v[i] = fmaf(x.v[i], by.v[i], sum.v[i]);
  };
  std::int32_t back = op.kernel - 1;
#pragma unroll 4
  for (; back > in_segment; --back) {
    const std::int64_t at = segment.position + in_segment - back;
    x = at < 0 ? Four{} : load_word(tape(at), word);
    add(weight(back));
  }
  for (; back >= 0; back -= kRowsAtOnce) {
    SomeRows by = {}, sums = {};
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i)
      if (i <= back) by[i] = weight(back - i);
    sums_at(row - back, word, sums);
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      if (i > back) break;
      for (int c = 0; c < 4; ++c) x.v[c] = sums[i].v[c] * op.scale;
      add(by[i]);
    }
  }
  store_word(tape(segment.position + in_segment), word, x);
  for (int i = 0; i < 4; ++i) sum.v[i] += x.v[i];
  return sum;
}

template <int kRanks, class SumsAt>
DUPLEX_DEVICE void add_and_norm(const Call<kRanks>& call, const ConvAddNormArgs& op,
                                std::int32_t row, const SumsAt& sums_at) {
  const NormRow sums = begin_norm(op.norm, op.width);
  const Segment& segment =
      segment_of(op.segments, row, reinterpret_cast<std::int32_t*>(sums.slot + kFour));
  float* const hidden = op.hidden + row * op.hidden_stride;
  for (std::int64_t w = thread_index(); call.is_worker() && w < sums.n / 4; w += call.n_workers) {
    Four sum = load_word(hidden, w);
    const Four x = convolve(op, segment, row, w, sums_at);
    for (int i = 0; i < 4; ++i) sum.v[i] += x.v[i];
    store_word(hidden, w, sum);
    store_word(sums.x, w, sum);
  }
  finish_norm(sums, op.eps, [&](std::int32_t i, const Four& y) { store_four(op.out, row, i, y); });
  sync_block();  // the next row's sums go to the same place
}

// Asks for the weights of the convolution, while parts are on their way: by the last warp of a
// block that has a row.
template <int kRanks>
DUPLEX_DEVICE void ask_for_weights(const Call<kRanks>& call, const ConvAddNormArgs& op) {
  const std::int32_t tap = thread_index() - call.n_workers;
  if (tap >= 0 && tap < op.kernel && block_x() < op.segments.n_rows)
    prefetch(op.conv.weight + tap * std::int64_t{op.conv.channels},
             static_cast<std::uint32_t>(op.conv.channels) * sizeof(float));
}

// fn(row) for the rows of this block, for the threads that send.
template <int kRanks, class Fn>
DUPLEX_DEVICE void for_rows(const Call<kRanks>& call, const ConvAddNormArgs& op, const Fn& fn) {
  for (std::int32_t row = block_x(); row < op.segments.n_rows && call.is_worker();
       row += call.group.n_blocks)
    fn(row);
}

// Words of a batch of rows are shared among the workers of all blocks, so that a row's parts do not
// all come into one multiprocessor; rows then look for their sums, and for those of rows before
// them, on the own GPU.
template <int kRanks>
DUPLEX_KERNEL one_shot_kernel(AllReduceArgs args) {
  wait_for_previous_grid();
  const Call<kRanks> call = begin_call<kRanks>(args.group, args.next);
  ask_for_weights(call, args.op);
  const std::int32_t n_rows = args.op.segments.n_rows;
  const auto n_words = static_cast<std::int32_t>(round_up(args.op.width, kColumnAlign) / 4);
  const std::int32_t of_rank = n_rows * n_words, sums = kRanks * of_rank;
  const bool is_direct = is_direct_sum(kRanks, n_rows, n_words);
  for (std::int32_t i = call.first(); i < of_rank && call.is_worker(); i += call.step()) {
    const std::int32_t row = i / n_words;
    call.broadcast(args.group.rank * of_rank + i,
                   load_word(args.part + row * args.part_stride, i - row * n_words));
  }
  for (std::int32_t i = call.first(); i < of_rank && call.is_worker(); i += call.step())
    if (!is_direct) store_system(args.group.own + call.at(sums + i), to_send(call.sum(i, of_rank)));
  for (std::int32_t row = block_x(); row < n_rows; row += args.group.n_blocks)
    add_and_norm(call, args.op, row, [&](std::int32_t first, std::int64_t w, SomeRows& to) {
      if (is_direct)
        to[0] = call.sum(w, of_rank);
      else
        call.sums(
            to, [&](int i) { return sums + up_to(row, first + i) * n_words + w; }, args.group.rank);
    });
  end_call(call, is_direct ? sums : sums + of_rank, false);
}

// Where the parts and the sums of two exchanges lie: a rank owns as many words of every row.
template <int kRanks>
struct TwoShot {
  std::int64_t n_rows, n_words, owned;

  DUPLEX_DEVICE explicit TwoShot(const ConvAddNormArgs& op)
      : n_rows(op.segments.n_rows),
        n_words(round_up(op.width, kColumnAlign) / 4),
        owned(div_up(n_words, kRanks)) {}
  DUPLEX_DEVICE std::int64_t part(int rank, std::int32_t row, std::int64_t word) const {
    return (rank * n_rows + row) * owned + word;
  }
  DUPLEX_DEVICE std::int64_t sum(std::int32_t row, std::int64_t word) const {
    return kRanks * n_rows * owned + row * n_words + word;
  }
  DUPLEX_DEVICE std::int64_t begin(int rank) const { return rank * owned; }
  DUPLEX_DEVICE std::int64_t end(int rank) const {
    return begin(rank + 1) < n_words ? begin(rank + 1) : n_words;
  }
};

// The sums are on their way: what is left of an all-reduce of two exchanges.
template <int kRanks>
DUPLEX_DEVICE void finish_two_shot(const Call<kRanks>& call, const AllReduceArgs& args,
                                   const TwoShot<kRanks>& place, bool has_met) {
  for (std::int32_t row = block_x(); row < place.n_rows; row += args.group.n_blocks)
    add_and_norm(call, args.op, row, [&](std::int32_t first, std::int64_t w, SomeRows& to) {
      call.sums(
          to, [&](int i) { return place.sum(up_to(row, first + i), w); },
          static_cast<int>(w / place.owned));
    });
  end_call(call, place.sum(static_cast<std::int32_t>(place.n_rows), 0), has_met);
}

template <int kRanks>
DUPLEX_KERNEL two_shot_kernel(AllReduceArgs args) {
  wait_for_previous_grid();
  const Call<kRanks> call = begin_call<kRanks>(args.group, args.next);
  ask_for_weights(call, args.op);
  const TwoShot<kRanks> place(args.op);
  const int rank = args.group.rank;
  for_rows(call, args.op, [&](std::int32_t row) {
    const float* const part = args.part + row * args.part_stride;
#pragma unroll
    for (int owner = 0; owner < kRanks; ++owner)
      for (std::int64_t w = place.begin(owner) + thread_index(); w < place.end(owner);
           w += call.n_workers)
        store_system(
            args.group.peers[owner] + call.at(place.part(rank, row, w - place.begin(owner))),
            to_send(load_word(part, w)));
  });
  for_rows(call, args.op, [&](std::int32_t row) {
    for (std::int64_t w = place.begin(rank) + thread_index(); w < place.end(rank);
         w += call.n_workers)
      call.broadcast(place.sum(row, w),
                     call.sum(place.part(0, row, w - place.begin(rank)), place.part(1, 0, 0)));
  });
  finish_two_shot(call, args, place, false);
}

template <int kRanks>
DUPLEX_KERNEL switch_kernel(AllReduceArgs args) {
  wait_for_previous_grid();
  const Call<kRanks> call = begin_call<kRanks>(args.group, args.next);
  ask_for_weights(call, args.op);
  const TwoShot<kRanks> place(args.op);
  const int rank = args.group.rank;
  for_rows(call, args.op, [&](std::int32_t row) {
    const float* const part = args.part + row * args.part_stride;
    for (std::int64_t w = thread_index(); w < place.n_words; w += call.n_workers)
      store_system(args.group.own + call.at(row * place.n_words + w), to_send(load_word(part, w)));
  });
  call.meet();
  for_rows(call, args.op, [&](std::int32_t row) {
    for (std::int64_t w = place.begin(rank) + thread_index(); w < place.end(rank);
         w += call.n_workers)
      call.broadcast(place.sum(row, w), received(multicast_sum(args.group.multicast +
                                                               call.at(row * place.n_words + w))));
  });
  finish_two_shot(call, args, place, true);
}

template <int kRanks>
DUPLEX_KERNEL reduce_scatter_kernel(ShareArgs args) {
  wait_for_previous_grid();
  const Call<kRanks> call = begin_call<kRanks>(args.group, args.next);
  const std::int64_t share = div_up(args.n_words, kRanks), rank = args.group.rank;
  const std::int64_t first = call.first(), step = call.step();
#pragma unroll
  for (int owner = 0; owner < kRanks; ++owner)
    for (std::int64_t i = first; i < share && call.is_worker(); i += step)
      if (owner * share + i < args.n_words)
        store_system(args.group.peers[owner] + call.at(rank * share + i),
                     to_send(load_word(args.in, owner * share + i)));
  for (std::int64_t i = first; i < share && call.is_worker(); i += step)
    if (rank * share + i < args.n_words) store_word(args.out, i, call.sum(i, share));
  end_call(call, kRanks * share, false);
}

template <int kRanks>
DUPLEX_KERNEL all_gather_kernel(ShareArgs args) {
  wait_for_previous_grid();
  const Call<kRanks> call = begin_call<kRanks>(args.group, args.next);
  const std::int64_t share = div_up(args.n_words, kRanks), rank = args.group.rank;
  const std::int64_t first = call.first(), step = call.step();
  for (std::int64_t i = first; i < share && call.is_worker(); i += step)
    if (rank * share + i < args.n_words) call.broadcast(rank * share + i, load_word(args.in, i));
  for (std::int64_t i = first; i < args.n_words && call.is_worker(); i += step) {
    Four word[1];
    call.sums(word, [&](int) { return i; }, static_cast<int>(i / share));
    store_word(args.out, i, word[0]);
  }
  end_call(call, args.n_words, false);
}

// ---- the host's side

// note: a rank without a share would be waited for by nobody, and could be overtaken.
void check_share(const char* op, const ShareArgs& args, std::int64_t n_words) {
  check_group(op, args.group, n_words * kWordBytes);
  check_next(op, args.next);
  const std::int64_t before_last =
      (args.group.n_ranks - 1) * div_up(args.n_words, args.group.n_ranks);
  check(before_last < args.n_words, op, ": expected a share for each of ", args.group.n_ranks,
        " ranks, found ", args.n_words, " words of 16 bytes");
}

}  // namespace

std::string describe(const WaitReport& report) {
  constexpr const char* kPhases[] = {"the parts", "the sums", "the signals"};
  std::ostringstream text;
  text << "rank " << report.rank << ", thread block " << report.block << ", waited in vain for "
       << kPhases[static_cast<std::uint32_t>(report.phase)] << " of call " << report.expected;
  if (report.peer >= 0)
    text << "; rank " << report.peer << " has begun call " << report.seen
         << (report.seen == report.expected ? " too" : "");
  return text.str();
}

std::int64_t all_reduce_bytes(int n_ranks, std::int64_t n_rows, std::int64_t width, Exchanges how) {
  const std::int64_t n_words = round_up(width, kColumnAlign) / 4;
  const std::int64_t parts = how == Exchanges::kOneShot ? n_words : div_up(n_words, n_ranks);
  const bool has_sums = how != Exchanges::kOneShot || !is_direct_sum(n_ranks, n_rows, n_words);
  return n_rows * (n_ranks * parts + (has_sums ? n_words : 0)) * kWordBytes;
}

void launch_all_reduce(Runtime& runtime, const AllReduceArgs& args, Exchanges how) {
  const std::int64_t n = round_up(args.op.width, kColumnAlign);
  check_group("all_reduce", args.group,
              all_reduce_bytes(args.group.n_ranks, args.op.segments.n_rows, n, how));
  check_next("all_reduce", args.next);
  check(args.op.segments.n_rows > 0, "all_reduce: expected 1 row or more, found none");
  check(how != Exchanges::kSwitch || args.group.multicast != nullptr,
        "all_reduce: reduction=\"switch\" needs multicast, which this group does not have");
  const int n_threads = threads_for(n / 4);
  const std::size_t bytes = NormRow::bytes(n) + sizeof(std::int64_t);  // and the segment's number
  if (how == Exchanges::kOneShot)
    launch_for(runtime, one_shot_kernel<2>, one_shot_kernel<4>, one_shot_kernel<8>, n_threads,
               bytes, args);
  else if (how == Exchanges::kTwoShot)
    launch_for(runtime, two_shot_kernel<2>, two_shot_kernel<4>, two_shot_kernel<8>, n_threads,
               bytes, args);
  else
    launch_for(runtime, switch_kernel<2>, switch_kernel<4>, switch_kernel<8>, n_threads, bytes,
               args);
}

void launch_reduce_scatter(Runtime& runtime, const ShareArgs& args) {
  const std::int64_t share = div_up(args.n_words, std::max(args.group.n_ranks, 1));
  check_share("reduce_scatter", args, args.group.n_ranks * share);
  launch_for(runtime, reduce_scatter_kernel<2>, reduce_scatter_kernel<4>, reduce_scatter_kernel<8>,
             threads_for(div_up(share, args.group.n_blocks)), 0, args);
}

void launch_all_gather(Runtime& runtime, const ShareArgs& args) {
  check_share("all_gather", args, args.n_words);
  launch_for(runtime, all_gather_kernel<2>, all_gather_kernel<4>, all_gather_kernel<8>,
             threads_for(div_up(args.n_words, args.group.n_blocks)), 0, args);
}

}  // namespace duplex::cuda
