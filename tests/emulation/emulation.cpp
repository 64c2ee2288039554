// The scheduler of the emulation: one thread of the CPU runs all threads of a block, each on a stack of its own.

#include <torch/csrc/stable/library.h>
#include <ucontext.h>

#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "emulated_device.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
namespace {

constexpr size_t kStack = 64 * 1024, kLanes = 32;
constexpr int kCapability = 90, kMultiprocessors = 2, kSharedBytes = 227 * 1024;

int capability = kCapability;
unsigned order_seed = 0;  // 0: first to last; otherwise a shuffled order of blocks and of threads

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  void run() const { std::memcpy(to, from, bytes); }
};

// Copies in groups that end with a commit; they happen when somebody waits for them, not before.
class Groups {
 public:
  void add(const Copy& copy) { open_.push_back(copy); }
  void commit() {
    groups_.push_back(open_);
    open_.clear();
  }
  void wait(size_t still_open) {
    for (; groups_.size() > still_open; groups_.pop_front()) {
      for (const Copy& copy : groups_.front()) {
        copy.run();
      }
    }
  }
  bool empty() const { return open_.empty() && groups_.empty(); }

 private:
  std::vector<Copy> open_;
  std::deque<std::vector<Copy>> groups_;
};

// A barrier for bulk loads: a phase ends when its bytes were announced and all of them have come.
struct LoadBarrier {
  uint32_t phase = 0, expected = 0;
  bool announced = false;
  std::vector<Copy> loads;

  bool try_complete() {
    size_t bytes = 0;
    for (const Copy& copy : loads) {
      bytes += copy.bytes;
    }
    if (!announced || bytes < expected) {
      return false;
    }
    if (bytes > expected) {
      throw std::runtime_error("bulk loads bring more bytes than the barrier expects");
    }
    for (const Copy& copy : loads) {
      copy.run();
    }
    loads.clear();
    announced = false;
    ++phase;
    return true;
  }
};

enum class State { ready, at_block_barrier, at_warp_barrier, done };

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  dim3 index;
  size_t number;
  State state;
  const void* shown;
  Groups async_copies, bulk_stores;
};

ucontext_t scheduler;
std::vector<std::unique_ptr<Thread>> threads;  // of the block that runs
size_t thread_count;
Thread* current;
const std::function<void()>* kernel;
std::string failure;
std::unique_ptr<void, decltype(&std::free)> shared(nullptr, &std::free);
std::vector<std::unique_ptr<LoadBarrier>> barriers;
const void* lanes_shown[64][kLanes];

void fail(const std::string& what) {
  throw std::runtime_error("emulation: " + what + ", in block (" + std::to_string(blockIdx.x) + ", " +
                           std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) + "), thread " +
                           std::to_string(current->number));
}

void run_thread() {
  try {
    (*kernel)();
    if (!current->async_copies.empty() || !current->bulk_stores.empty()) {
      fail("a thread ends before its asynchronous copies");
    }
  } catch (const std::exception& error) {
    failure = error.what();
  }
  current->state = State::done;
  swapcontext(&current->context, &scheduler);
}

void yield(State state) {
  Thread* const mine = current;
  mine->state = state;
  swapcontext(&mine->context, &scheduler);
}

// Lets those go on whose barrier everybody has reached. Whether there was any.
bool release() {
  bool released = false;
  const auto all = [](size_t begin, size_t end, State state) {
    bool any = false;
    for (size_t i = begin; i < end; ++i) {
      if (threads[i]->state != state && threads[i]->state != State::done) {
        return false;
      }
      any = any || threads[i]->state == state;
    }
    return any;
  };
  const auto go = [&released](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) {
      if (threads[i]->state != State::done) {
        threads[i]->state = State::ready;
      }
    }
    released = true;
  };
  for (size_t begin = 0; begin < thread_count; begin += kLanes) {
    const size_t end = std::min(begin + kLanes, thread_count);
    if (all(begin, end, State::at_warp_barrier)) {
      go(begin, end);
    }
  }
  if (all(0, thread_count, State::at_block_barrier)) {
    go(0, thread_count);
  }
  return released;
}

std::vector<size_t> order(size_t count, unsigned salt) {
  std::vector<size_t> numbers(count);
  std::iota(numbers.begin(), numbers.end(), size_t{0});
  if (order_seed != 0) {
    std::shuffle(numbers.begin(), numbers.end(), std::mt19937(order_seed + salt));
  }
  return numbers;
}

dim3 coordinates(size_t number, dim3 size) {
  return dim3(static_cast<unsigned>(number % size.x), static_cast<unsigned>(number / size.x % size.y),
              static_cast<unsigned>(number / size.x / size.y));
}

void run_block(size_t shared_bytes) {
  shared.reset(std::aligned_alloc(128, (shared_bytes + 127) / 128 * 128));
  std::memset(shared.get(), 0xff, shared_bytes);  // NaN in every type
  barriers.clear();
  for (size_t i = 0; i < thread_count; ++i) {
    Thread& thread = *threads[i];
    thread.number = i;
    thread.index = coordinates(i, blockDim);
    thread.state = State::ready;
    thread.async_copies = thread.bulk_stores = Groups();
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    makecontext(&thread.context, &run_thread, 0);
  }
  const std::vector<size_t> turns = order(thread_count, blockIdx.x + 1);
  for (bool going = true; going;) {
    going = false;
    for (const size_t i : turns) {
      if (threads[i]->state == State::ready) {
        current = threads[i].get();
        threadIdx = current->index;
        swapcontext(&scheduler, &current->context);
        if (!failure.empty()) {
          return;
        }
        going = true;
      }
    }
    going = release() || going;
  }
  for (size_t i = 0; i < thread_count; ++i) {
    if (threads[i]->state != State::done) {
      current = threads[i].get();
      failure = "emulation: threads wait at a barrier that others never reach";
      return;
    }
  }
}

LoadBarrier& load_barrier(const uint64_t* barrier) {
  if (*barrier >= barriers.size()) {
    fail("a barrier that was not initialised");
  }
  return *barriers[*barrier];
}

void set_order(int64_t seed) {
  order_seed = static_cast<unsigned>(seed);
}

void set_capability(int64_t value) {
  capability = static_cast<int>(value);
}

}  // namespace

void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& function) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  if (shared_bytes > kSharedBytes) {
    throw std::runtime_error("emulation: a block asks for " + std::to_string(shared_bytes) + " bytes of shared memory");
  }
  gridDim = grid;
  blockDim = block;
  thread_count = size_t{block.x} * block.y * block.z;
  while (threads.size() < thread_count) {
    threads.push_back(std::make_unique<Thread>());
  }
  kernel = &function;
  failure.clear();
  for (const size_t number : order(size_t{grid.x} * grid.y * grid.z, 0)) {
    blockIdx = coordinates(number, grid);
    run_block(shared_bytes);
    if (!failure.empty()) {
      throw std::runtime_error(failure);
    }
  }
}

void synchronise_block() {
  yield(State::at_block_barrier);
}

void synchronise_warp() {
  yield(State::at_warp_barrier);
}

int lane() {
  return static_cast<int>(current->number % kLanes);
}

const void* const* meet(const void* mine) {
  const void** lanes = lanes_shown[current->number / kLanes];
  lanes[current->number % kLanes] = mine;
  synchronise_warp();
  return lanes;
}

void part() {
  synchronise_warp();
}

void* shared_memory() {
  return shared.get();
}

void check_alignment(const void* pointer, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) {
    fail("an access that is not aligned to " + std::to_string(bytes) + " bytes");
  }
}

void copy_async(void* to, const void* from) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) {
    fail("an asynchronous copy that is not aligned to 16 bytes");
  }
  current->async_copies.add({to, from, 16});
}

void copy_async_commit() {
  current->async_copies.commit();
}

void copy_async_wait(int open_groups) {
  current->async_copies.wait(static_cast<size_t>(open_groups));
}

void barrier_init(uint64_t* barrier) {
  barriers.push_back(std::make_unique<LoadBarrier>());
  *barrier = barriers.size() - 1;
}

void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  LoadBarrier& state = load_barrier(barrier);
  if (state.announced) {
    fail("the bytes of a phase announced twice");
  }
  state.announced = true;
  state.expected = bytes;
}

void barrier_wait(const uint64_t* barrier, uint32_t parity) {
  for (int turn = 0; load_barrier(barrier).phase % 2 == parity && !load_barrier(barrier).try_complete(); ++turn) {
    if (turn > 1000) {
      fail("nothing completes the phase that a thread waits for");
    }
    yield(State::ready);
  }
}

void bulk(const void* to, const void* from, uint32_t bytes) {
  if (bytes == 0 || bytes % 16 != 0 || reinterpret_cast<uintptr_t>(to) % 16 != 0 ||
      reinterpret_cast<uintptr_t>(from) % 16 != 0) {
    fail("a bulk copy that is empty or not aligned to 16 bytes");
  }
}

void bulk_load(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  bulk(to, from, bytes);
  load_barrier(barrier).loads.push_back({to, from, bytes});
}

void bulk_store(void* to, const void* from, uint32_t bytes) {
  bulk(to, from, bytes);
  current->bulk_stores.add({to, from, bytes});
}

void bulk_store_commit() {
  current->bulk_stores.commit();
}

void bulk_store_wait(int open_groups) {
  current->bulk_stores.wait(static_cast<size_t>(open_groups));
}

}  // namespace emulation

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = emulation::capability / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = emulation::capability % 10;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = emulation::kMultiprocessors;
      break;
    default:
      *value = emulation::kSharedBytes;
  }
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

STABLE_TORCH_LIBRARY_FRAGMENT(pspnet_fast_emulated, m) {
  m.def("set_order(int seed) -> ()");
  m.def("set_capability(int capability) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pspnet_fast_emulated, CompositeExplicitAutograd, m) {
  m.impl("set_order", TORCH_BOX(&emulation::set_order));
  m.impl("set_capability", TORCH_BOX(&emulation::set_capability));
}
