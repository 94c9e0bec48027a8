#include "device/runtime.h"

#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>
#include <utility>

#include "core/error.h"
#include "core/types.h"
#include "device/cuda_check.h"
#include "device/page_memory.h"

namespace duplex::cuda {
namespace {

constexpr std::size_t kRingBytes = std::size_t{4} << 20;
constexpr std::int64_t kStageAlign = 256;
constexpr std::size_t kUsualSharedBytes = 48 << 10;

// Whether a list like "90a-real,100a-real" has code for a GPU: such code runs on no other.
constexpr bool has_code(std::string_view targets, std::string_view capability) {
  for (std::size_t at = 0; (at = targets.find(capability, at)) != targets.npos; ++at) {
    const std::size_t end = at + capability.size();
    const bool begins = at == 0 || targets[at - 1] == ',';
    if (begins && (end == targets.size() || targets[end] < '0' || targets[end] > '9')) return true;
  }
  return false;
}
static_assert(has_code("90a-real,100a-real", "90") && has_code("90a-real,100a-real", "100"));
static_assert(!has_code("100a-real,103a-real", "10") && !has_code("103a-real", "03"));

cudaStream_t as_stream(void* stream) { return static_cast<cudaStream_t>(stream); }
cudaEvent_t as_event(void* event) { return static_cast<cudaEvent_t>(event); }
cudaGraph_t as_graph(void* graph) { return static_cast<cudaGraph_t>(graph); }

// A graph that is being made.
class Graph {
 public:
  Graph() { check_cuda(cudaGraphCreate(&graph_, 0), "cudaGraphCreate"); }
  ~Graph() {
    if (graph_ != nullptr) cudaGraphDestroy(graph_);
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  cudaGraph_t get() const { return graph_; }
  cudaGraph_t release() { return std::exchange(graph_, nullptr); }

 private:
  cudaGraph_t graph_ = nullptr;
};

void* instantiate(cudaGraph_t graph) {
  cudaGraphExec_t runnable = nullptr;
  check_cuda(cudaGraphInstantiate(&runnable, graph, 0), "cudaGraphInstantiate");
  return runnable;
}

// A loop behind all that the stream has captured; returns the graph of what is inside.
cudaGraph_t add_loop(cudaGraph_t graph, cudaStream_t capturing, cudaGraphConditionalHandle loop) {
  cudaStreamCaptureStatus status{};
  const cudaGraphNode_t* before = nullptr;
  const cudaGraphEdgeData* edges = nullptr;
  std::size_t n_before = 0;
  check_cuda(
      cudaStreamGetCaptureInfo(capturing, &status, nullptr, nullptr, &before, &edges, &n_before),
      "cudaStreamGetCaptureInfo");
  cudaGraphNodeParams params{};
  params.type = cudaGraphNodeTypeConditional;
  params.conditional.handle = loop;
  params.conditional.type = cudaGraphCondTypeWhile;
  params.conditional.size = 1;
  cudaGraphNode_t node = nullptr;
  check_cuda(cudaGraphAddNode(&node, graph, before, edges, n_before, &params), "cudaGraphAddNode");
  return params.conditional.phGraph_out[0];
}

void* create_stream(int priority) {
  cudaStream_t stream = nullptr;
  check_cuda(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, priority),
             "cudaStreamCreateWithPriority");
  return stream;
}

// DUPLEX_CUDA_PDL=0 lets every kernel end before the next begins (programmatic dependent launch is
// CUDA's name for the other way), so that the two can be compared.
bool may_launch_early() {
  static const bool may = [] {
    const char* const value = std::getenv("DUPLEX_CUDA_PDL");
    const std::string_view text = value == nullptr ? "1" : value;
    check(text == "0" || text == "1", "DUPLEX_CUDA_PDL: expected 0 or 1, found '", text, "'");
    return text == "1";
  }();
  return may;
}

void* create_event() {
  cudaEvent_t event = nullptr;
  check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
  return event;
}

}  // namespace

Runtime::Runtime(int device) : device_(device) {
  int n_devices = 0;
  const cudaError_t found = cudaGetDeviceCount(&n_devices);
  // Without a driver every call says "insufficient driver", with one and no GPU "no device".
  check<BackendUnavailable>(found == cudaSuccess && n_devices > 0,
                            "backend 'cuda': expected an NVIDIA GPU and its driver, found none (",
                            cudaGetErrorName(found), "); use device=\"cpu\"");
  cudaDeviceProp properties;
  check<BackendUnavailable>(device < n_devices, "backend 'cuda': expected GPU ", device, ", found ",
                            n_devices, n_devices == 1 ? " GPU" : " GPUs",
                            "; load with fewer ranks, or say which GPUs are theirs (gpus=[...])");
  if (device < 0)
    check_cuda<BackendUnavailable>(cudaGetDevice(&device_), "cudaGetDevice");
  else
    make_current(device_);
  check_cuda<BackendUnavailable>(cudaGetDeviceProperties(&properties, device_),
                                 "cudaGetDeviceProperties");
  const std::string capability = std::to_string(10 * properties.major + properties.minor);
  check<BackendUnavailable>(has_code(DUPLEX_CUDA_TARGETS, capability),
                            "backend 'cuda': expected a GPU that this build has ",
                            "kernels for (" DUPLEX_CUDA_TARGETS "), found ", properties.name,
                            " with compute capability ", properties.major, ".", properties.minor,
                            "; use device=\"cpu\", or build with ",
                            "DUPLEX_CUDA_ARCHITECTURES=", capability, "-real");
  device_name_ = properties.name;
  resident_blocks_ = properties.multiProcessorCount / 2;
  most_shared_bytes_ = properties.sharedMemPerBlockOptin;
  reads_host_memory_ = properties.pageableMemoryAccessUsesHostPageTables != 0;
  page_granularity_ = page_granularity_of(device_);
  open(LaneKind::kInteraction);
}

Runtime::Runtime(Runtime& beside, LaneKind lane)
    : device_name_(beside.device_name_),
      page_granularity_(beside.page_granularity_),
      device_(beside.device_),
      resident_blocks_(beside.resident_blocks_),
      most_shared_bytes_(beside.most_shared_bytes_),
      reads_host_memory_(beside.reads_host_memory_) {
  open(lane);
}

void Runtime::make_current(int device) { check_cuda(cudaSetDevice(device), "cudaSetDevice"); }

void Runtime::open(LaneKind lane) {
  make_current(device_);
  may_launch_early();  // a wrong value is said here, not in the middle of a pass
  int least = 0, greatest = 0;
  check_cuda(cudaDeviceGetStreamPriorityRange(&least, &greatest),
             "cudaDeviceGetStreamPriorityRange");
  const int priority = lane == LaneKind::kInteraction ? greatest : least;
  stream_ = create_stream(priority);
  recording_ = create_stream(priority);
  for (void** event : {&given_, &marks_[0], &marks_[1]}) *event = create_event();
  void* memory = nullptr;
  check_cuda<CapacityError>(cudaMallocHost(&memory, kRingBytes), "cudaMallocHost");
  ring_host_ = static_cast<std::byte*>(memory);
  ring_device_ = static_cast<std::byte*>(allocate(kRingBytes));
}

Runtime::~Runtime() {
  cudaSetDevice(device_);  // a finaliser's thread has another
  cudaStreamSynchronize(as_stream(stream_));
  release(ring_device_);
  cudaFreeHost(ring_host_);
  for (void* event : {given_, marks_[0], marks_[1]}) cudaEventDestroy(as_event(event));
  cudaStreamDestroy(as_stream(recording_));
  cudaStreamDestroy(as_stream(stream_));
}

void* Runtime::allocate(std::size_t bytes) {
  make_current(device_);
  void* memory = nullptr;
  const std::size_t taken = bytes == 0 ? 1 : bytes;
  const cudaError_t code = cudaMalloc(&memory, taken);
  check<CapacityError>(code == cudaSuccess, "memory: could not allocate ", bytes, " bytes on ",
                       device_name_, ": ", cudaGetErrorString(code));
  check_cuda(cudaMemsetAsync(memory, 0, taken, as_stream(behind_chain())), "cudaMemsetAsync");
  return memory;
}

void Runtime::release(void* memory) noexcept { cudaFree(memory); }

void* Runtime::allocate_host(std::size_t bytes) {
  void* memory = nullptr;
  check_cuda<CapacityError>(cudaMallocHost(&memory, bytes), "cudaMallocHost");
  std::memset(memory, 0, bytes);
  return memory;
}

void Runtime::release_host(void* memory) noexcept { cudaFreeHost(memory); }

std::unique_ptr<DevicePages> Runtime::create_pages(std::size_t page_bytes, std::int64_t n_pages) {
  return create_cuda_pages(device_, page_bytes, n_pages);
}

void Runtime::write(void* device, const void* host, std::size_t bytes) {
  check_cuda(
      cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, as_stream(behind_chain())),
      "cudaMemcpyAsync to the device");
  // From pageable memory CUDA takes its copy before it returns, unless the GPU reads such memory.
  if (reads_host_memory_) synchronize();
}

void Runtime::read(void* host, const void* device, std::size_t bytes) {
  check_cuda(
      cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, as_stream(behind_chain())),
      "cudaMemcpyAsync to the host");
  synchronize();
}

void Runtime::copy(void* destination, const void* source, std::size_t bytes) {
  check_cuda(cudaMemcpyAsync(destination, source, bytes, cudaMemcpyDeviceToDevice,
                             as_stream(behind_chain())),
             "cudaMemcpyAsync on the device");
}

void* Runtime::stage(const void* host, std::size_t bytes) {
  check<CapacityError>(bytes <= kRingBytes / 2, "cuda: expected at most ", kRingBytes / 2,
                       " bytes of input in one piece, found ", bytes,
                       "; give the engine a smaller max_batch_rows");
  if (ring_at_ + bytes > kRingBytes) {
    synchronize();  // what is to be overwritten has been copied and read
    ring_at_ = 0;
  }
  std::memcpy(ring_host_ + ring_at_, host, bytes);
  void* const device = ring_device_ + ring_at_;
  check_cuda(cudaMemcpyAsync(device, ring_host_ + ring_at_, bytes, cudaMemcpyHostToDevice,
                             as_stream(behind_chain())),
             "cudaMemcpyAsync to the device");
  ring_at_ += static_cast<std::size_t>(round_up(static_cast<std::int64_t>(bytes), kStageAlign));
  return device;
}

void Runtime::synchronize() {
  make_current(device_);
  ++n_waits_;
  check_cuda(cudaStreamSynchronize(as_stream(stream_)), "a kernel or copy");
}

void Runtime::wait_for(Runtime& other) {
  make_current(device_);
  check_cuda(cudaEventRecord(as_event(other.given_), as_stream(other.stream_)), "cudaEventRecord");
  check_cuda(cudaStreamWaitEvent(as_stream(behind_chain()), as_event(other.given_), 0),
             "cudaStreamWaitEvent");
}

void Runtime::keep_close() {
  make_current(device_);
  check_cuda(cudaEventRecord(as_event(marks_[next_mark_]), as_stream(stream_)), "cudaEventRecord");
  next_mark_ ^= 1;
  check_cuda(cudaEventSynchronize(as_event(marks_[next_mark_])), "a kernel or copy");
  ++n_waits_;
}

Record::~Record() {
  cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph_));
  if (source_ != nullptr) cudaGraphDestroy(static_cast<cudaGraph_t>(source_));
}

void Runtime::capture(void* graph, const std::function<void()>& work,
                      const std::function<void()>& end_of_it) {
  make_current(device_);
  check_cuda(cudaStreamBeginCaptureToGraph(as_stream(recording_), as_graph(graph), nullptr, nullptr,
                                           0, cudaStreamCaptureModeThreadLocal),
             "cudaStreamBeginCaptureToGraph");
  cudaGraph_t same = nullptr;
  is_recording_ = true;
  in_recorded_chain_ = false;
  try {
    work();
    end_of_it();
  } catch (...) {
    is_recording_ = false;
    cudaStreamEndCapture(as_stream(recording_), &same);
    throw;
  }
  is_recording_ = false;
  check_cuda(cudaStreamEndCapture(as_stream(recording_), &same), "cudaStreamEndCapture");
}

std::unique_ptr<Record> Runtime::record(const std::function<void()>& work) {
  const Graph graph;
  capture(graph.get(), work);
  return std::make_unique<Record>(instantiate(graph.get()));
}

// note: a graph with a loop can have one runnable form, and stays with it.
std::unique_ptr<Record> Runtime::record_loop(const std::function<void(Loop)>& first,
                                             const std::function<void(Loop)>& again) {
  make_current(device_);  // the loop belongs to this GPU
  Graph graph;
  cudaGraphConditionalHandle loop = 0;
  check_cuda(cudaGraphConditionalHandleCreate(&loop, graph.get(), 0, cudaGraphCondAssignDefault),
             "cudaGraphConditionalHandleCreate");
  cudaGraph_t inside = nullptr;
  capture(
      graph.get(), [&] { first(loop); },
      [&] { inside = add_loop(graph.get(), as_stream(recording_), loop); });
  capture(inside, [&] { again(loop); });
  void* const runnable = instantiate(graph.get());
  return std::make_unique<Record>(runnable, graph.release());
}

void Runtime::play(const Record& record) {
  ++n_launches_;
  check_cuda(
      cudaGraphLaunch(static_cast<cudaGraphExec_t>(record.graph()), as_stream(behind_chain())),
      "cudaGraphLaunch");
}

void* Runtime::behind_chain() {
  make_current(device_);
  in_chain_ = false;
  return stream_;
}

void Runtime::launch_kernel(const void* kernel, Grid grid, int n_threads, std::size_t shared_bytes,
                            void** args, bool is_early) {
  make_current(device_);
  if (shared_bytes > kUsualSharedBytes) {
    check<CapacityError>(shared_bytes <= most_shared_bytes_, "cuda: a thread block needs ",
                         shared_bytes, " bytes of shared memory, expected at most ",
                         most_shared_bytes_);
    // As much as there may be: the limit is the kernel's, in all lanes and records.
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(most_shared_bytes_)),
               "asking for shared memory");
  }
  const bool in_chain = is_recording_ ? in_recorded_chain_ : in_chain_.load();
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
                        static_cast<unsigned>(grid.z));
  config.blockDim = dim3(static_cast<unsigned>(n_threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = as_stream(is_recording_ ? recording_ : stream_);
  config.attrs = &early;
  config.numAttrs = is_early && in_chain && may_launch_early() ? 1 : 0;
  check_cuda(cudaLaunchKernelExC(&config, kernel, args), "cudaLaunchKernelExC");
  if (!is_recording_) ++n_launches_;
  if (is_recording_)
    in_recorded_chain_ = is_early;
  else
    in_chain_ = is_early;
}

}  // namespace duplex::cuda
