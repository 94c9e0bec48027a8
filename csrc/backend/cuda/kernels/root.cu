// What rank 0 alone has or wants: words that go from it to all ranks, and rows of which each rank
// sends it a slice. A word of every rank comes first, which all wait for, so that none is ever
// further ahead than the buffers allow (all_reduce.h).
#include "kernels/all_reduce.h"
#include "kernels/exchange.cuh"
#include "kernels/exchange_launch.h"

namespace duplex::cuda {
namespace {

constexpr std::int64_t root_bytes(int n_ranks, std::int64_t n_words) {
  return (n_ranks + n_words) * kWordBytes;
}

template <int kRanks>
DUPLEX_DEVICE void meet_all(const Call<kRanks>& call) {
  if (call.first() != 0) return;
  call.broadcast(call.group.rank, Four{});
  call.sum(0, 1);
}

template <int kRanks>
DUPLEX_KERNEL broadcast_kernel(ShareArgs args) {
  wait_for_previous_grid();
  const Call<kRanks> call = begin_call<kRanks>(args.group, args.next);
  const bool is_root = args.group.rank == 0;
  const std::int64_t first = call.first(), step = call.step();
  for (std::int64_t i = first; is_root && i < args.n_words && call.is_worker(); i += step)
    call.broadcast(kRanks + i, load_word(args.in, i));
  meet_all(call);
  for (std::int64_t i = first; !is_root && i < args.n_words && call.is_worker(); i += step) {
    Four word[1];
    call.sums(word, [&](int) { return kRanks + i; }, 0);
    store_word(args.out, i, word[0]);
  }
  end_call(call, kRanks + args.n_words, false);
}

template <int kRanks>
DUPLEX_KERNEL gather_kernel(GatherSlicesArgs args) {
  wait_for_previous_grid();
  const Call<kRanks> call = begin_call<kRanks>(args.group, {});
  const auto row_words = static_cast<std::int32_t>(args.stride / 4);
  const std::int32_t of_rank = args.n_rows * row_words;
  const std::int32_t at_root = args.group.rank == 0 ? kRanks * of_rank : 0;
  for (std::int32_t i = call.first(); i < of_rank && call.is_worker(); i += call.step())
    store_system(args.group.peers[0] + call.at(kRanks + args.group.rank * of_rank + i),
                 to_send(load_word(args.in, i)));
  meet_all(call);
  for (std::int32_t i = call.first(); i < at_root && call.is_worker(); i += call.step()) {
    const std::int32_t rank = i / of_rank, row = i % of_rank / row_words;
    const std::int32_t column = 4 * (i % row_words);
    Four word[1];
    call.sums(word, [&](int) { return kRanks + i; }, rank);
    float* const out = args.out + row * args.out_stride + args.slices[rank].first + column;
    for (int c = 0; c < 4; ++c)
      if (column + c < args.slices[rank].n) out[c] = word[0].v[c];
  }
  end_call(call, kRanks + at_root, false);
}

}  // namespace

void launch_broadcast(Runtime& runtime, const ShareArgs& args) {
  check_group("broadcast", args.group, root_bytes(args.group.n_ranks, args.n_words));
  check_next("broadcast", args.next);
  launch_for(runtime, broadcast_kernel<2>, broadcast_kernel<4>, broadcast_kernel<8>,
             threads_for(div_up(args.n_words, args.group.n_blocks)), 0, args);
}

std::int32_t most_gathered_rows(int n_ranks, std::int64_t buffer_bytes, std::int64_t stride) {
  return static_cast<std::int32_t>((buffer_bytes - root_bytes(n_ranks, 0)) /
                                   (n_ranks * stride * std::int64_t{sizeof(float)}));
}

void launch_gather(Runtime& runtime, const GatherSlicesArgs& args) {
  const std::int64_t n_words = args.n_rows * args.stride / 4;  // of a rank
  check_group("gather", args.group, root_bytes(args.group.n_ranks, args.group.n_ranks * n_words));
  check(args.stride % 4 == 0, "gather: expected rows of a multiple of 4 floats, found ",
        args.stride);
  launch_for(runtime, gather_kernel<2>, gather_kernel<4>, gather_kernel<8>,
             threads_for(div_up(args.group.n_ranks * n_words, args.group.n_blocks)), 0, args);
}

}  // namespace duplex::cuda
