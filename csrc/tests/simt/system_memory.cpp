#include "tests/simt/system_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <cstring>
#include <mutex>
#include <new>
#include <shared_mutex>
#include <thread>

#include "tests/simt/order.h"

namespace duplex::simt {
namespace {

thread_local PendingStores* pending = nullptr;

struct Objects {
  std::shared_mutex mutex;
  std::vector<const Multicast*> all;
};
Objects& objects() {
  static Objects instance;
  return instance;
}

void check_aligned(const void* address, int n) {
  if (reinterpret_cast<std::uintptr_t>(address) % (4 * static_cast<std::size_t>(n)) != 0)
    throw std::logic_error("an access of several words: the address is no multiple of their size");
}

std::atomic_ref<std::uint32_t> word_at(const void* address, int i) {
  return std::atomic_ref(static_cast<std::uint32_t*>(const_cast<void*>(address))[i]);
}

// note: for other threads and processes, which other ranks may be, an access of several words is
// one of each.
void happen(void* address, const std::uint32_t* words, int n, bool is_count) {
  if (is_count)
    word_at(address, 0).fetch_add(1, std::memory_order_relaxed);
  else
    for (int i = 0; i < n; ++i) word_at(address, i).store(words[i], std::memory_order_relaxed);
}

const Multicast& object_of(const void* address) {
  const Multicast* const object = Multicast::of(address);
  if (object == nullptr) throw std::logic_error("an address that is no multicast object's");
  return *object;
}

void put(std::byte* address, const std::uint32_t* words, int n, bool is_count) {
  check_aligned(address, n);
  if (is_count) release(address);
  if (pending != nullptr) {
    for (int i = 0; i < n; ++i) note_store(address + 4 * i);
    const Unseen unseen;
    pending->add(address, words, n, is_count);
    return;
  }
  happen(address, words, n, is_count);
}

}  // namespace

void load_system(const void* address, std::uint32_t* words, int n) {
  check_aligned(address, n);
  if (Multicast::of(address) != nullptr)
    throw std::logic_error("a plain load of a multicast address");
  for (int i = 0; i < n; ++i) words[i] = word_at(address, i).load(std::memory_order_relaxed);
}

void store_system(void* address, const std::uint32_t* words, int n) {
  if (Multicast::of(address) != nullptr)
    throw std::logic_error("a plain store to a multicast address");
  put(static_cast<std::byte*>(address), words, n, false);
}

void multicast_store(void* address, const std::uint32_t* words, int n) {
  const Multicast& object = object_of(address);
  for (std::size_t r = 0; r < object.size(); ++r) put(object.place(r, address), words, n, false);
}

void multicast_sum(const void* address, std::uint32_t* words, int n) {
  const Multicast& object = object_of(address);
  for (int i = 0; i < n; ++i) {
    float sum = 0.0f;
    for (std::size_t r = object.size(); r-- > 0;) {
      sum += std::bit_cast<float>(
          word_at(object.place(r, address), i).load(std::memory_order_relaxed));
    }
    std::memcpy(&words[i], &sum, 4);
  }
}

void multicast_count(std::uint32_t* counter) {
  const std::uint32_t one = 1;
  const Multicast& object = object_of(counter);
  for (std::size_t r = 0; r < object.size(); ++r) put(object.place(r, counter), &one, 1, true);
}

void fence_system() {
  if (pending != nullptr) {
    const Unseen unseen;
    return pending->fence();
  }
  std::atomic_thread_fence(std::memory_order_seq_cst);
}

std::uint64_t clock_ns() {
  if (current_place == nullptr)
    throw std::logic_error("the clock of kernels is read outside of one");
  yield();
  if (pending != nullptr) return pending->clock();
  // Who is waited for may need this very core.
  constexpr int kThreads = 32;
  static thread_local int n_calls = 0;
  const Unseen unseen;
  if (++n_calls % kThreads == 0) std::this_thread::yield();
  return static_cast<std::uint64_t>(
      std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count());
}

Multicast::Multicast(std::vector<std::byte*> members, std::size_t bytes, std::byte* base)
    : base_(base), bytes_(bytes), owns_(base == nullptr), members_(std::move(members)) {
  if (owns_) {
    void* const range = ::mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (range == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<std::byte*>(range);
  }
  const std::unique_lock lock(objects().mutex);
  objects().all.push_back(this);
}

Multicast::~Multicast() {
  {
    const std::unique_lock lock(objects().mutex);
    std::erase(objects().all, this);
  }
  if (owns_) ::munmap(base_, bytes_);
}

const Multicast* Multicast::of(const void* address) {
  const auto* const at = static_cast<const std::byte*>(address);
  const std::shared_lock lock(objects().mutex);
  for (const Multicast* object : objects().all)
    if (at >= object->base_ && at < object->base_ + object->bytes_) return object;
  return nullptr;
}

PendingStores::PendingStores(std::uint32_t seed) : random_(seed) { pending = this; }
PendingStores::~PendingStores() { pending = nullptr; }

void PendingStores::set_launch(int stream, int launch) {
  stream_ = stream;
  launch_ = launch;
  const auto n = static_cast<std::size_t>(stream) + 1;
  if (waiting_.size() < n) {
    waiting_.resize(n);
    index_.resize(n);
  }
}

// Stores of one GPU to one place happen in their order.
void PendingStores::add(std::byte* address, const std::uint32_t* words, int n, bool is_count) {
  auto& waiting = waiting_[static_cast<std::size_t>(stream_)];
  auto& index = index_[static_cast<std::size_t>(stream_)];
  const auto before = index.find(address);
  if (before != index.end()) happen(stream_, before->second);
  index[address] = waiting.size();
  Store& store = waiting.emplace_back(Store{address, {}, n, is_count, launch_, origin()});
  std::copy_n(words, n, store.words);
}

void PendingStores::perform(Store& store) {
  simt::happen(store.address, store.words, store.n, store.is_count);
}

void PendingStores::happen(int stream, std::size_t at) {
  auto& waiting = waiting_[static_cast<std::size_t>(stream)];
  auto& index = index_[static_cast<std::size_t>(stream)];
  perform(waiting[at]);
  index.erase(waiting[at].address);
  if (at + 1 < waiting.size()) {
    waiting[at] = waiting.back();
    index[waiting[at].address] = at;
  }
  waiting.pop_back();
}

void PendingStores::fence() {
  const Origin here = origin();
  const auto& waiting = waiting_[static_cast<std::size_t>(stream_)];
  for (std::size_t i = waiting.size(); i-- > 0;) {
    const Store& store = waiting[i];
    const bool is_before =
        store.launch < launch_ ||
        (store.from.block == here.block &&
         (store.from.thread == here.thread || store.from.n_barriers < here.n_barriers));
    if (is_before) happen(stream_, i);
  }
}

// Of a store of four words, now and then one word goes ahead.
void PendingStores::drain(std::uint32_t one_in) {
  std::size_t n_all = 0;
  for (const auto& waiting : waiting_) n_all += waiting.size();
  if (n_all == 0) return;
  for (std::size_t n = n_all / one_in + (random_() % one_in == 0 ? 1 : 0); n > 0; --n) {
    std::size_t stream = random_() % waiting_.size();
    while (waiting_[stream].empty()) stream = (stream + 1) % waiting_.size();
    const std::size_t at = random_() % waiting_[stream].size();
    Store& store = waiting_[stream][at];
    if (store.n == 4 && random_() % 8 == 0) {
      const std::size_t word = random_() % 4;
      std::memcpy(store.address + 4 * word, &store.words[word], 4);
    } else {
      happen(static_cast<int>(stream), at);
    }
    if (--n_all == 0) return;
  }
}

}  // namespace duplex::simt
