// The choice of tokens: one thread block for a row of logits. What it computes: backend/sampling.h,
// whose sums are of whole numbers, so that it is the CPU's choice in whatever order they are made.
//
// Top-k, top-p and the draw are searches alike: for the key, a rank or an id, at which numbers or
// weights of ids, added up from the lowest key on, exceed something. A pass over the ids adds them
// up in a histogram of keys, and the bin with that key is the range of the next pass. As soon as
// what a filter may keep fits into shared memory it is listed there, for all passes that follow.
#include "kernels/common.cuh"
#include "kernels/launchers.h"

namespace duplex::cuda {
namespace {

constexpr int kSampleThreads = 1024;
constexpr std::uint32_t kBins = 1024;
constexpr int kColumns = 8;  // of a bin, by lane: few lanes of a warp meet at one address
constexpr std::uint32_t kPitch = kBins + kWarp / kColumns;  // nor do two columns in one bank
constexpr std::uint32_t kMostListed = 8192;

struct Best {
  float logit;
  std::uint32_t id;
};

DUPLEX_DEVICE Best better_of(const Best& a, const Best& b) {
  if (a.logit != b.logit) return a.logit > b.logit ? a : b;
  return a.id < b.id ? a : b;
}

// An id, and by how many ranks it is worse than the best.
struct Entry {
  std::uint32_t worse;
  std::uint32_t id;
};
// Those that are so much worse weigh nothing: they are neither kept nor drawn.
constexpr std::uint32_t kWeightless = std::bit_cast<std::uint32_t>(kLeastWeighed);

DUPLEX_DEVICE std::uint64_t weight_of(std::uint32_t worse) {
  return weight_below_best(std::bit_cast<float>(worse));
}

struct Range {
  std::uint32_t begin, end;
  DUPLEX_DEVICE bool has(std::uint32_t x) const { return x - begin < end - begin; }
};

// A key, or a bin of them: what is left there of the number that is searched for, and their sum.
struct Found {
  std::uint32_t key;
  std::uint64_t left, sum;
};

struct Shared {
  std::uint32_t low[kColumns * kPitch];  // halves of the histogram's sums
  std::uint32_t high[kColumns * kPitch];
  std::uint64_t sums[2][kSampleThreads];
  Entry list[kMostListed];
  Best best[kSampleThreads];
  Found found;
  std::uint32_t n_listed;

  DUPLEX_DEVICE void add(std::uint32_t bin, std::uint64_t value) {
    const std::uint32_t at = thread_index() % kColumns * kPitch + bin;
    const auto lower = static_cast<std::uint32_t>(value);
    const std::uint32_t carry = add_shared(&low[at], lower) > ~lower ? 1 : 0;
    const std::uint32_t upper = static_cast<std::uint32_t>(value >> 32) + carry;
    if (upper != 0) add_shared(&high[at], upper);
  }
  DUPLEX_DEVICE std::uint64_t sum(std::uint32_t bin) const {
    std::uint64_t all = 0;
    for (std::uint32_t at = bin; at < kColumns * kPitch; at += kPitch)
      all += low[at] + (std::uint64_t{high[at]} << 32);
    return all;
  }
};

// The bin in which sums, added up, exceed left_of(all of them); the first where all are 0.
template <class Left>
DUPLEX_DEVICE Found find_bin(Shared& shared, const Left& left_of) {
  const std::uint32_t n_own = kBins / n_threads(), first = thread_index() * n_own;
  std::uint64_t own = 0;
  for (std::uint32_t bin = first; bin < first + n_own; ++bin) own += shared.sum(bin);
  std::uint64_t up_to_own = shared.sums[0][thread_index()] = own;
  if (thread_index() == 0) shared.found = {0, 0, 0};
  sync_block();
  int from = 0;
  for (int step = 1; step < n_threads(); step *= 2, from ^= 1) {
    if (thread_index() >= step) up_to_own += shared.sums[from][thread_index() - step];
    shared.sums[from ^ 1][thread_index()] = up_to_own;
    sync_block();
  }
  std::uint64_t left = left_of(shared.sums[from][n_threads() - 1]);
  if (up_to_own - own <= left && left < up_to_own) {
    left -= up_to_own - own;
    std::uint32_t bin = first;
    for (; left >= shared.sum(bin); ++bin) left -= shared.sum(bin);
    shared.found = {bin, left, shared.sum(bin)};
  }
  sync_block();
  return shared.found;
}

// The key at which the values that each(range, add) gives to keys of a range, by add(key, value),
// exceed left_of(all of them). then(range) is called for every range in which the key is.
template <class Each, class Left, class Then>
DUPLEX_DEVICE Found search(Shared& shared, Range range, const Each& each, const Left& left_of,
                           const Then& then) {
  Found found{};
  for (bool is_first = true;; is_first = false) {
    int shift = 0;
    while ((range.end - range.begin - 1) >> shift >= kBins) ++shift;
    for (std::uint32_t i = thread_index(); i < kColumns * kPitch; i += n_threads())
      shared.low[i] = shared.high[i] = 0;
    sync_block();
    each(range, [&](std::uint32_t key, std::uint64_t value) {
      shared.add((key - range.begin) >> shift, value);
    });
    sync_block();
    found =
        find_bin(shared, [&](std::uint64_t all) { return is_first ? left_of(all) : found.left; });
    found.key = range.begin + (found.key << shift);
    if (shift == 0) return found;
    const std::uint32_t n_left = range.end - found.key, n_bin = 1u << shift;
    range = {found.key, found.key + (n_bin < n_left ? n_bin : n_left)};
    then(range);
  }
}

// use(id, logit) for a range of ids, by a thread in ascending order; so many loads of it are on
// their way at a time.
template <int kLoads, class Use>
DUPLEX_DEVICE void each_logit(const float* logits, const Range& ids, const Use& use) {
  const std::uint32_t step = kFour * n_threads();
  for (std::uint32_t at = ids.begin / kFour * kFour + kFour * thread_index(); at < ids.end;
       at += kLoads * step) {
    Four x[kLoads];
    for (int i = 0; i < kLoads; ++i)
      x[i] = load_four(logits + (at + i * step < ids.end ? at + i * step : at));
    for (int i = 0; i < kLoads; ++i)
      for (int c = 0; c < kFour; ++c)
        if (const std::uint32_t id = at + i * step + c; ids.has(id)) use(id, x[i].v[c]);
  }
}

DUPLEX_DEVICE Best find_best(Shared& shared, const float* logits, std::uint32_t n_vocab) {
  Best best{kMinusInfinity, 0};
  each_logit<4>(logits, {0, n_vocab}, [&](std::uint32_t id, float logit) {
    if (logit > best.logit) best = {logit, id};
  });
  Best* const own = &shared.best[thread_index()];
  *own = best;
  for (int n = n_threads() / 2; n > 0; n /= 2) {
    sync_block();
    if (thread_index() < n) *own = better_of(*own, own[n]);
  }
  sync_block();
  return shared.best[0];
}

// A row of logits, and which of its ids may come: those less than `worse` worse than the best, and
// of those that are just so much worse the ones below `tie_end`. They are listed, or not.
struct Kept {
  const float* logits;
  std::uint32_t n_vocab;
  float best;
  float temperature;
  float reciprocal;
  std::uint32_t worse = kWeightless;
  std::uint32_t tie_end = 0;
  bool is_listed = false;

  // kBestRank - sampling_rank(). A quotient that is corrected once is the division's in the last
  // bit (Markstein 1990), if the reciprocal is and no step of it is below the normal numbers.
  DUPLEX_DEVICE std::uint32_t worse_than_best(float logit) const {
    const float below = logit - best;
    if (!(fabsf(below) > (temperature > 0x1p-20f && temperature < 0x1p20f ? 0x1p-90f : INFINITY)))
      return kBestRank - sampling_rank(logit, best, temperature);
    const float nearly = below * reciprocal;
    const float scaled = fmaf(fmaf(-nearly, temperature, below), reciprocal, nearly);
    return std::bit_cast<std::uint32_t>(scaled) & kBestRank;
  }

  // use(entry) for those of some ranks and ids.
  template <int kLoads, class Use>
  DUPLEX_DEVICE void each(const Shared& shared, const Range& ranks, const Range& ids,
                          const Use& use) const {
    const auto look_at = [&](const Entry& entry) {
      if (ranks.has(entry.worse) && !(entry.worse == worse && entry.id >= tie_end)) use(entry);
    };
    if (is_listed) {
      for (std::uint32_t i = thread_index(); i < shared.n_listed; i += n_threads())
        if (ids.has(shared.list[i].id)) look_at(shared.list[i]);
      return;
    }
    // No logit further below the best has one of the ranks: most ids need no division.
    const float least = -(std::bit_cast<float>(ranks.end) * 1.0001f + 0x1p-126f) * temperature;
    each_logit<kLoads>(logits, ids, [&](std::uint32_t id, float logit) {
      if (!(logit - best < least)) look_at({worse_than_best(logit), id});
    });
  }

  // Lists those before a rank, if there is room.
  DUPLEX_DEVICE void make_list(Shared& shared, std::uint32_t end) {
    if (is_listed) return;
    if (thread_index() == 0) shared.n_listed = 0;
    sync_block();
    each<4>(shared, {0, end}, {0, n_vocab}, [&](const Entry& entry) {
      const std::uint32_t i = add_shared(&shared.n_listed, 1);
      if (i < kMostListed) shared.list[i] = entry;
    });
    sync_block();
    is_listed = shared.n_listed <= kMostListed;
  }

  // Keeps the best of them, up to the one at which numbers or weights exceed left_of(all).
  template <class Value, class Left>
  DUPLEX_DEVICE void keep(Shared& shared, const Value& value_of, const Left& left_of) {
    const auto each_rank = [&](const Range& ranks, const auto& add) {
      each<2>(shared, ranks, {0, n_vocab},
              [&](const Entry& entry) { add(entry.worse, value_of(entry.worse)); });
    };
    const Found last = search(shared, {0, worse < kWeightless ? worse + 1 : kWeightless}, each_rank,
                              left_of, [&](const Range& ranks) { make_list(shared, ranks.end); });
    if (last.key < worse) tie_end = n_vocab;
    worse = last.key;
    const std::uint64_t before_last = last.left / value_of(worse);  // of those with its rank
    if ((before_last + 1) * value_of(worse) < last.sum)
      tie_end = 1 + find_id(
                        shared, {worse, worse + 1}, [](std::uint32_t) { return 1; },
                        [&](std::uint64_t) { return before_last; });
  }

  // The id at which values of those of some ranks, added up by id, exceed left_of(all).
  template <class Value, class Left>
  DUPLEX_DEVICE std::uint32_t find_id(Shared& shared, const Range& ranks, const Value& value_of,
                                      const Left& left_of) const {
    const auto each_id = [&](const Range& ids, const auto& add) {
      each<2>(shared, ranks, ids,
              [&](const Entry& entry) { add(entry.id, value_of(entry.worse)); });
    };
    return search(shared, {0, n_vocab}, each_id, left_of, [](const Range&) {}).key;
  }
};

DUPLEX_DEVICE std::uint32_t choose(const float* logits, std::uint32_t n_vocab,
                                   const SampleRow& at) {
  auto& shared = *reinterpret_cast<Shared*>(shared_memory());
  const SamplingParams& params = at.params;
  const Best best = find_best(shared, logits, n_vocab);
  if (params.temperature == 0.0f) return best.id;
  Kept kept{logits, n_vocab, best.logit, params.temperature, 1.0f / params.temperature};
  const auto weight = [](std::uint32_t worse) { return weight_of(worse); };
  const auto k = static_cast<std::uint64_t>(params.top_k);
  if (k > 0 && k < n_vocab)
    kept.keep(
        shared, [](std::uint32_t) { return 1; },
        [&](std::uint64_t n) { return (k < n ? k : n) - 1; });
  if (params.top_p < 1.0f)
    kept.keep(shared, weight,
              [&](std::uint64_t mass) { return wanted_mass(params.top_p, mass) - 1; });
  const std::uint64_t share = random_bits(params.seed, at.position);
  return kept.find_id(shared, {0, kept.worse + 1}, weight,
                      [&](std::uint64_t mass) { return share_of(share, mass); });
}

DUPLEX_KERNEL_OF(kSampleThreads, 1) sample_kernel(SampleArgs args) {
  const std::uint32_t token =
      choose(args.logits + block_x() * args.logits_stride, static_cast<std::uint32_t>(args.n_vocab),
             args.rows[block_x()]);
  if (thread_index() == 0) args.tokens[block_x()] = static_cast<std::int32_t>(token);
}

}  // namespace

void launch_sample(Runtime& runtime, const SampleArgs& args) {
  runtime.launch(sample_kernel, {args.n_rows}, kSampleThreads, sizeof(Shared), args);
}

}  // namespace duplex::cuda
