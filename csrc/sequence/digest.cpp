// Hashes of what a sequence holds.
#include "core/hash.h"
#include "sequence/sequence.h"

namespace duplex {
namespace {

bool is_hidden(std::span<const PositionRange> holes, std::int64_t position) {
  for (const PositionRange& hole : holes)
    if (position >= hole.begin && position < hole.end) return true;
  return false;
}

}  // namespace

std::vector<BlockDigest> Sequence::digests() const {
  std::vector<BlockDigest> digests;
  std::vector<std::byte> block_bytes;
  const Tape* const tapes[] = {&global_, &local_, &conv_};
  for (std::int32_t t = 0; t < 3; ++t) {
    const TapeLayout& layout = tapes[t]->layout();
    if (layout.is_inert()) continue;
    const TapeView view = tapes[t]->view();
    for (std::int64_t block = tapes[t]->held().begin / layout.block_positions;
         (block + 1) * layout.block_positions <= committed_; ++block) {
      if (t == 0 && is_hidden(forgotten(), block * layout.block_positions)) continue;
      block_bytes.resize(static_cast<std::size_t>(layout.block_bytes));
      pool_->memory().read(block_bytes.data(), view.block(block), block_bytes.size());
      FastHash hash;
      hash.add(block_bytes.data(), block_bytes.size());
      digests.push_back({t, block, hash.value()});
    }
  }
  return digests;
}

}  // namespace duplex
