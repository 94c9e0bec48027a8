// The choice of tokens: one thread block for a row of logits. What it computes: backend/sampling.h,
// whose sums are of whole numbers, so that it is the CPU's choice in whatever order they are made.
#include "kernels/common.cuh"
#include "kernels/launchers.h"

namespace duplex::cuda {
namespace {

constexpr int kSampleThreads = 1024;
constexpr int kDigit = 2;  // bits of a rank that one pass over the row settles
constexpr int kSums = (1 << kDigit) - 1;

// Of a thread, on its way to a sum over the block.
struct Sums {
  std::uint64_t v[kSums];
};

struct Best {
  float logit;
  std::int32_t id;
};

DUPLEX_DEVICE Best better_of(const Best& a, const Best& b) {
  if (a.logit != b.logit) return a.logit > b.logit ? a : b;
  return a.id < b.id ? a : b;
}

DUPLEX_DEVICE Sums sum_of(const Sums& a, const Sums& b) {
  Sums sums;
  for (int i = 0; i < kSums; ++i) sums.v[i] = a.v[i] + b.v[i];
  return sums;
}

// What all threads' values come to, for every thread; the block has a power of two of them.
template <class T, class Join>
DUPLEX_DEVICE T join_block(const T& value, const Join& join) {
  T* const slots = reinterpret_cast<T*>(shared_memory());
  slots[thread_index()] = value;
  for (int n = n_threads() / 2; n > 0; n /= 2) {
    sync_block();
    if (thread_index() < n)
      slots[thread_index()] = join(slots[thread_index()], slots[thread_index() + n]);
  }
  sync_block();
  const T all = slots[0];
  sync_block();
  return all;
}

struct Row {
  const float* logits;
  std::int32_t n_vocab;
  float best;
  float temperature;

  DUPLEX_DEVICE std::uint32_t rank(std::int32_t id) const {
    return sampling_rank(logits[id], best, temperature);
  }
};

// Which ids may come: those above a rank, and of those with the rank the `n_ties` lowest.
struct Kept {
  std::uint32_t rank;
  std::uint64_t n_ties;
  std::uint64_t mass;
};

DUPLEX_DEVICE Best find_best(const float* logits, std::int32_t n_vocab) {
  Best best{kMinusInfinity, 0};
  for (std::int32_t id = thread_index(); id < n_vocab; id += n_threads())
    if (logits[id] > best.logit) best = {logits[id], id};
  return join_block(best, [](const Best& a, const Best& b) { return better_of(a, b); });
}

// Sums over the ids of the row: v[0] to v[2] are what `add` makes of each rank.
template <class Add>
DUPLEX_DEVICE Sums sum_row(const Row& row, const Add& add) {
  Sums sums{};
  for (std::int32_t id = thread_index(); id < row.n_vocab; id += n_threads())
    add(row.rank(id), sums);
  return join_block(sums, [](const Sums& a, const Sums& b) { return sum_of(a, b); });
}

DUPLEX_DEVICE std::uint64_t measure(std::uint32_t rank, bool is_mass) {
  return is_mass ? sampling_weight(rank) : 1;
}

// The best ids that come to `wanted` together, by number or by mass, and no more of them.
DUPLEX_DEVICE Kept keep_best(const Row& row, std::uint64_t wanted, bool is_mass) {
  std::uint32_t rank = 0;  // the highest at which what is as good comes to `wanted`
  for (int shift = 30; shift >= 0; shift -= kDigit) {
    const Sums sums = sum_row(row, [&](std::uint32_t of, Sums& to) {
      const std::uint64_t n = of >= rank ? measure(of, is_mass) : 0;
      for (int i = 0; i < kSums; ++i)
        if (of >= (rank | static_cast<std::uint32_t>(i + 1) << shift)) to.v[i] += n;
    });
    std::uint32_t digit = 0;
    while (digit < kSums && sums.v[digit] >= wanted) ++digit;
    rank |= digit << shift;
  }
  const Sums above = sum_row(row, [&](std::uint32_t of, Sums& to) {
    if (of <= rank) return;
    to.v[0] += measure(of, is_mass);
    to.v[1] += sampling_weight(of);
  });
  const std::uint64_t each = measure(rank, is_mass);
  const std::uint64_t n_ties = (wanted - above.v[0] + each - 1) / each;
  return {rank, n_ties, above.v[1] + n_ties * sampling_weight(rank)};
}

// A piece of the row: what its ids above the rank weigh, and how many have the rank.
struct Piece {
  std::uint64_t mass;
  std::uint64_t n_ties;
};

DUPLEX_DEVICE std::uint64_t least(std::uint64_t a, std::uint64_t b) { return a < b ? a : b; }

// The id where the weights of those kept, added up by id, exceed `left`. Each warp takes a piece of
// the range; the piece with the id is the next range.
DUPLEX_DEVICE std::int32_t find_id(const Row& row, const Kept& kept, std::uint64_t left) {
  auto* const of_threads = reinterpret_cast<Piece*>(shared_memory());
  Piece* const of_warps = of_threads + n_threads();
  const int n_warps = n_threads() / kWarp;
  const int lane = thread_index() % kWarp;
  const std::uint64_t tie_weight = sampling_weight(kept.rank);
  std::uint64_t n_ties = kept.n_ties;
  std::int32_t begin = 0, end = row.n_vocab;
  while (end - begin > 1) {
    const std::int32_t step = (end - begin + n_warps - 1) / n_warps;
    const std::int32_t own = begin + thread_index() / kWarp * step;
    Piece piece{0, 0};
    for (std::int32_t i = lane; i < step && own + i < end; i += kWarp) {
      const std::uint32_t rank = row.rank(own + i);
      if (rank > kept.rank) piece.mass += sampling_weight(rank);
      if (rank == kept.rank) ++piece.n_ties;
    }
    of_threads[thread_index()] = piece;
    sync_block();
    if (thread_index() < n_warps) {
      Piece all{0, 0};
      for (int i = 0; i < kWarp; ++i) {
        all.mass += of_threads[thread_index() * kWarp + i].mass;
        all.n_ties += of_threads[thread_index() * kWarp + i].n_ties;
      }
      of_warps[thread_index()] = all;
    }
    sync_block();
    for (int warp = 0; warp < n_warps; ++warp, begin += step) {
      const std::uint64_t ties = least(of_warps[warp].n_ties, n_ties);
      const std::uint64_t mass = of_warps[warp].mass + ties * tie_weight;
      if (left < mass) break;
      left -= mass;
      n_ties -= ties;
    }
    end = end < begin + step ? end : begin + step;
  }
  return begin;
}

DUPLEX_DEVICE std::int32_t choose(const float* logits, std::int32_t n_vocab, const SampleRow& at) {
  const SamplingParams& params = at.params;
  const Best best = find_best(logits, n_vocab);
  if (params.temperature == 0.0f) return best.id;
  const Row row{logits, n_vocab, best.logit, params.temperature};
  const Sums all = sum_row(row, [](std::uint32_t of, Sums& to) { to.v[0] += sampling_weight(of); });
  if (all.v[0] == 0) return best.id;  // no logit is a number
  Kept kept{0, static_cast<std::uint64_t>(n_vocab), all.v[0]};
  if (params.top_k > 0 && params.top_k < n_vocab)
    kept = keep_best(row, static_cast<std::uint64_t>(params.top_k), false);
  if (params.top_p < 1.0f) kept = keep_best(row, wanted_mass(params.top_p, kept.mass), true);
  return find_id(row, kept, share_of(random_bits(params.seed, at.position), kept.mass));
}

DUPLEX_KERNEL_OF(kSampleThreads, 1) sample_kernel(SampleArgs args) {
  const std::int32_t token =
      choose(args.logits + block_x() * args.logits_stride, args.n_vocab, args.rows[block_x()]);
  if (thread_index() == 0) args.tokens[block_x()] = token;
}

}  // namespace

void launch_sample(Runtime& runtime, const SampleArgs& args) {
  runtime.launch(sample_kernel, {args.n_rows}, kSampleThreads, kSampleThreads * sizeof(Sums), args);
}

}  // namespace duplex::cuda
