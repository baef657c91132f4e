#include "fake_runtime.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <set>
#include <stdexcept>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

#include "controls.h"
#include "emulation.h"

struct FakeNode {
  std::string what;
  std::function<void()> run;
  std::vector<FakeNode*> after;
};

struct FakeGraph {
  std::vector<std::shared_ptr<FakeNode>> nodes;
};

struct FakeExecutable {
  FakeGraph graph;
  int device;
};

struct FakeStream {
  std::deque<std::function<void()>> work;
  std::uint64_t queued = 0, done = 0;
  FakeGraph* capturing = nullptr;
  FakeNode* last = nullptr;
  int device = 0;
};

struct FakeEvent {
  int device = 0;
  FakeStream* stream = nullptr;
  std::uint64_t after = 0;
};

namespace emulation {
namespace {

int devices = 1, call_number = 0, failing_call = 0;
thread_local int current_device = 0;
std::map<std::string, int> counted, live;
std::map<void*, std::pair<void*, std::size_t>> guarded;
std::set<FakeStream*> streams;
FakeStream legacy;

FakeStream& of(cudaStream_t stream) { return stream == nullptr ? legacy : *stream; }

// The legacy stream is each device's own.
bool is_of(cudaStream_t stream, int device) { return stream == nullptr || stream->device == device; }

bool fails() { return ++call_number == failing_call; }

void queue(FakeStream& stream, std::function<void()> work) {
  stream.work.push_back(std::move(work));
  ++stream.queued;
}

void work_off(FakeStream& stream, std::uint64_t until) {
  while (stream.done < until) {
    const std::function<void()> work = std::move(stream.work.front());
    stream.work.pop_front();
    ++stream.done;
    work();
  }
}

// Each node as late as its dependencies allow, so that a missing one shows.
void run_graph(const FakeGraph& graph) {
  std::set<const FakeNode*> done;
  while (done.size() < graph.nodes.size()) {
    const auto ready = [&](const std::shared_ptr<FakeNode>& node) {
      return done.count(node.get()) == 0 &&
             std::all_of(node->after.begin(), node->after.end(),
                         [&](const FakeNode* other) { return done.count(other) != 0; });
    };
    const auto next = std::find_if(graph.nodes.rbegin(), graph.nodes.rend(), ready);
    if (next == graph.nodes.rend()) throw std::runtime_error("a graph's nodes wait for each other");
    (*next)->run();
    done.insert(next->get());
  }
}

void run_launch(const Launch& launch, const std::string& how) {
  ++counted[how + launch.kernel];
  run_grid(launch.kernel, launch.grid, launch.block, launch.body);
}

FakeNode* add(FakeGraph& graph, std::string what, const cudaGraphNode_t* after, std::size_t count) {
  auto node = std::make_shared<FakeNode>();
  node->what = std::move(what);
  if (count > 0) node->after.assign(after, after + count);
  graph.nodes.push_back(node);
  return node.get();
}

}  // namespace

void fail_call(int number) {
  call_number = 0;
  failing_call = number;
}
void set_devices(int count) { devices = count; }
void set_device(int device) { current_device = device; }
int device() { return current_device; }
int calls() { return call_number; }
bool failed() { return failing_call != 0 && call_number >= failing_call; }

std::map<std::string, int> launches() {
  std::map<std::string, int> found;
  found.swap(counted);
  return found;
}

std::map<std::string, int> live_objects() {
  std::map<std::string, int> found;
  for (const auto& [kind, count] : live) {
    if (count != 0) found[kind] = count;
  }
  return found;
}

int pending() {
  std::size_t work = legacy.work.size();
  for (const FakeStream* stream : streams) work += stream->work.size();
  return static_cast<int>(work);
}

void* allocate_guarded(std::size_t bytes, std::size_t align) {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const std::size_t used = (bytes + align - 1) / align * align;
  const std::size_t inside = (used + page - 1) / page * page;
  auto* const base = static_cast<char*>(
      mmap(nullptr, inside + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  mprotect(base + page, inside, PROT_READ | PROT_WRITE);
  std::memset(base + page, 0xFF, inside);
  void* const at = base + page + inside - used;
  guarded[at] = {base, inside + 2 * page};
  return at;
}

void free_guarded(void* at) {
  const auto [base, bytes] = guarded.at(at);
  munmap(base, bytes);
  guarded.erase(at);
}

void add_host_node(FakeGraph* graph, const std::function<void()>& function) {
  add(*graph, "host", nullptr, 0)->run = function;
}

cudaError_t enqueue(cudaStream_t stream, const Launch& launch) {
  if (fails()) return cudaErrorMemoryAllocation;
  if (!is_of(stream, current_device)) return cudaErrorInvalidResourceHandle;
  FakeStream& on = of(stream);
  if (on.capturing == nullptr) {
    queue(on, [launch] { run_launch(launch, ""); });
    return cudaSuccess;
  }
  FakeNode* const node = add(*on.capturing, launch.kernel, &on.last, on.last != nullptr);
  node->run = [launch] { run_launch(launch, "graph "); };
  on.last = node;
  return cudaSuccess;
}

}  // namespace emulation

using namespace emulation;

const char* cudaGetErrorString(cudaError_t status) {
  switch (status) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorInvalidResourceHandle: return "invalid resource handle";
    default: return "invalid argument";
  }
}

const char* cudaGetErrorName(cudaError_t status) {
  switch (status) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorNoDevice: return "cudaErrorNoDevice";
    case cudaErrorInvalidResourceHandle: return "cudaErrorInvalidResourceHandle";
    default: return "cudaErrorInvalidValue";
  }
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaGetDeviceCount(int* count) {
  *count = std::max(devices, 0);
  return devices == 0 ? cudaErrorNoDevice : cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  if (fails()) return cudaErrorMemoryAllocation;
  *device = current_device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (fails()) return cudaErrorMemoryAllocation;
  if (device < 0 || device >= devices) return cudaErrorInvalidValue;
  current_device = device;
  return cudaSuccess;
}

// Pageable memory is read when the call is made.
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  if (fails()) return cudaErrorMemoryAllocation;
  const auto* const first = static_cast<const char*>(from);
  const std::vector<char> staged(first, first + bytes);
  queue(of(stream), [to, staged] { std::memcpy(to, staged.data(), staged.size()); });
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  if (fails()) return cudaErrorMemoryAllocation;
  *stream = new FakeStream;
  (*stream)->device = current_device;
  streams.insert(*stream);
  ++live["stream"];
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  streams.erase(stream);
  delete stream;
  --live["stream"];
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (fails()) return cudaErrorMemoryAllocation;
  work_off(of(stream), of(stream).queued);
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (fails()) return cudaErrorMemoryAllocation;
  if (stream == nullptr || stream->capturing != nullptr) return cudaErrorInvalidValue;
  stream->capturing = new FakeGraph;
  stream->last = nullptr;
  ++live["graph"];
  return cudaSuccess;
}

// A capture that fails has ended, and leaves no graph.
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  if (stream->capturing == nullptr) return cudaErrorInvalidValue;
  const cudaGraph_t captured = stream->capturing;
  stream->capturing = nullptr;
  if (!fails()) {
    *graph = captured;
    return cudaSuccess;
  }
  cudaGraphDestroy(captured);
  *graph = nullptr;
  return cudaErrorMemoryAllocation;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  if (fails()) return cudaErrorMemoryAllocation;
  *event = new FakeEvent;
  (*event)->device = current_device;
  ++live["event"];
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  --live["event"];
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  if (fails()) return cudaErrorMemoryAllocation;
  if (!is_of(stream, event->device)) return cudaErrorInvalidResourceHandle;
  event->stream = &of(stream);
  event->after = of(stream).queued;
  return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (fails()) return cudaErrorMemoryAllocation;
  if (event->stream != nullptr) work_off(*event->stream, event->after);
  return cudaSuccess;
}

cudaError_t cudaGraphCreate(cudaGraph_t* graph, unsigned) {
  if (fails()) return cudaErrorMemoryAllocation;
  *graph = new FakeGraph;
  ++live["graph"];
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  --live["graph"];
  return cudaSuccess;
}

cudaError_t cudaGraphAddChildGraphNode(cudaGraphNode_t* node, cudaGraph_t graph,
                                       const cudaGraphNode_t* after, std::size_t count,
                                       cudaGraph_t child) {
  if (fails()) return cudaErrorMemoryAllocation;
  if (child == nullptr) return cudaErrorInvalidValue;
  *node = add(*graph, "child", after, count);
  (*node)->run = [body = *child] { run_graph(body); };
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned) {
  if (fails()) return cudaErrorMemoryAllocation;
  *executable = new FakeExecutable{*graph, current_device};
  ++live["executable"];
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete executable;
  --live["executable"];
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  if (fails()) return cudaErrorMemoryAllocation;
  if (of(stream).capturing != nullptr) return cudaErrorStreamCaptureInvalidated;
  if (!is_of(stream, executable->device)) return cudaErrorInvalidResourceHandle;
  ++counted["graph launch"];
  queue(of(stream), [executable] { run_graph(executable->graph); });
  return cudaSuccess;
}
