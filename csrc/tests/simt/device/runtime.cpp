#include "device/runtime.h"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <utility>

#include "backend/cpu/page_memory.h"
#include "core/error.h"
#include "core/owner_process.h"

namespace duplex::cuda {
namespace {

constexpr std::size_t kRingBytes = std::size_t{4} << 20;  // of the real one
constexpr auto kAlign = std::align_val_t{256};            // that of cudaMalloc

// Of no bytes, memcpy still wants pointers that are none.
void copy_bytes(void* destination, const void* source, std::size_t bytes) {
  if (bytes > 0) std::memcpy(destination, source, bytes);
}

using Bytes = std::vector<std::byte>;
std::shared_ptr<Bytes> copy_of(const void* host, std::size_t bytes) {
  auto piece = std::make_shared<Bytes>(bytes);
  copy_bytes(piece->data(), host, bytes);
  return piece;
}

// A page holds NaN when it is mapped for the first time: the driver promises nothing.
class HostPages final : public DevicePages {
 public:
  HostPages(std::size_t page_bytes, std::int64_t n_pages)
      : memory_(create_cpu_page_memory(page_bytes, n_pages)),
        was_mapped_(static_cast<std::size_t>(n_pages)) {}

  std::byte* reserve(std::size_t bytes) override {
    check<CapacityError>(owner_.is_here(), "page memory: CUDA does not work in a fork");
    return memory_->reserve_range(bytes);
  }
  void free(std::byte* base, std::size_t bytes) noexcept override {
    memory_->release_range(base, bytes);
  }
  void map(std::byte* address, PageId page) override {
    memory_->map(address, page);
    if (was_mapped_[static_cast<std::size_t>(page)]) return;
    was_mapped_[static_cast<std::size_t>(page)] = true;
    std::memset(address, 0xff, memory_->page_bytes());
  }
  void unmap(std::byte* address) noexcept override { memory_->unmap(address); }

 private:
  OwnerProcess owner_;
  std::unique_ptr<PageMemory> memory_;
  std::vector<bool> was_mapped_;
};

}  // namespace

Runtime::Runtime(int device)
    : device_(std::max(device, 0)),
      queues_(std::make_shared<simt::Queues>()),
      queue_(queues_->open()) {
  const char* const value = std::getenv("DUPLEX_SIMT_DEVICES");
  const int n_devices = value == nullptr ? 8 : std::atoi(value);
  check<BackendUnavailable>(device_ < n_devices, "backend 'cuda': expected GPU ", device,
                            ", found ", n_devices, n_devices == 1 ? " GPU" : " GPUs",
                            "; load with fewer ranks, or say which GPUs are theirs (gpus=[...])");
}

Runtime::Runtime(Runtime& beside, LaneKind)
    : device_(beside.device_), queues_(beside.queues_), queue_(queues_->open()) {}

Runtime::~Runtime() { queues_->close(queue_); }

void Runtime::put(std::function<void()> work) {
  if (recording_ != nullptr) throw std::logic_error("a record can hold nothing but launches");
  queues_->give(queue_, std::move(work));
}

void Runtime::put(const simt::Launch& launch) {
  if (recording_ != nullptr) return recording_->push_back(launch);
  ++n_launches_;
  put([=] { simt::run_chain({launch}); });
}

void* Runtime::allocate(std::size_t bytes) {
  void* const memory = ::operator new(bytes, kAlign, std::nothrow);
  check<CapacityError>(memory != nullptr, "memory: could not allocate ", bytes, " bytes on ",
                       device_name_);
  std::memset(memory, 0xff, bytes);
  put([=] { std::memset(memory, 0, bytes); });
  return memory;
}

void Runtime::release(void* memory) noexcept {
  simt::Queues::finish_everything();
  ::operator delete(memory, kAlign);
}

void* Runtime::allocate_host(std::size_t bytes) {
  void* const memory = ::operator new(bytes, kAlign);
  std::memset(memory, 0, bytes);
  return memory;
}

void Runtime::release_host(void* memory) noexcept { ::operator delete(memory, kAlign); }

std::unique_ptr<DevicePages> Runtime::create_pages(std::size_t page_bytes, std::int64_t n_pages) {
  return std::make_unique<HostPages>(page_bytes, n_pages);
}

void Runtime::write(void* device, const void* host, std::size_t bytes) {
  put([=, piece = copy_of(host, bytes)] { copy_bytes(device, piece->data(), bytes); });
}

void Runtime::read(void* host, const void* device, std::size_t bytes) {
  put([=] { copy_bytes(host, device, bytes); });
  synchronize();
}

void Runtime::copy(void* destination, const void* source, std::size_t bytes) {
  put([=] { copy_bytes(destination, source, bytes); });
}

// A piece of its own for every call, wiped as soon as the real ring might have reused its place:
// a piece that does not fit behind the others there begins at the front, so after half a ring.
void* Runtime::stage(const void* host, std::size_t bytes) {
  check<CapacityError>(bytes <= kRingBytes / 2, "cuda: expected at most ", kRingBytes / 2,
                       " bytes of input in one piece, found ", bytes,
                       "; give the engine a smaller max_batch_rows");
  while (!staged_.empty() && staged_bytes_ + bytes > kRingBytes / 2) {
    put([piece = staged_.front()] { std::fill(piece->begin(), piece->end(), std::byte{0xff}); });
    staged_bytes_ -= staged_.front()->size();
    staged_.pop_front();
  }
  staged_bytes_ += bytes;
  const auto& piece = staged_.emplace_back(std::make_shared<Bytes>(bytes, std::byte{0xff}));
  put([=, to = piece, from = copy_of(host, bytes)] {
    copy_bytes(to->data(), from->data(), bytes);
  });
  return piece->data();
}

void Runtime::synchronize() {
  ++n_waits_;
  queues_->finish(queue_, queues_->n_given(*queue_));
}

void Runtime::keep_close() {
  marks_[0] = std::exchange(marks_[1], queues_->n_given(*queue_));
  queues_->finish(queue_, marks_[0]);
  ++n_waits_;
}

void Runtime::record_into(Record::Launches& launches, const std::function<void()>& work) {
  recording_ = &launches;
  try {
    work();
  } catch (...) {
    recording_ = nullptr;
    throw;
  }
  recording_ = nullptr;
}

std::unique_ptr<Record> Runtime::record(const std::function<void()>& work) {
  auto record = std::make_unique<Record>();
  record_into(record->notes->launches, work);
  return record;
}

std::unique_ptr<Record> Runtime::record_loop(const std::function<void(Loop)>& first,
                                             const std::function<void(Loop)>& again) {
  auto record = std::make_unique<Record>();
  const Loop loop = std::bit_cast<Loop>(&record->notes->goes_on);
  record_into(record->notes->launches, [&] { first(loop); });
  record_into(record->notes->loop, [&] { again(loop); });
  return record;
}

void Runtime::play(const Record& record) {
  ++n_launches_;
  put([notes = record.notes] {
    notes->goes_on = false;
    simt::run_chain(notes->launches);
    while (notes->goes_on) simt::run_chain(notes->loop);
  });
}

}  // namespace duplex::cuda
