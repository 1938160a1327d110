#include "simt.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <random>
#include <string>
#include <vector>

namespace simt {
namespace {

constexpr size_t kStack = size_t{128} << 10;
constexpr unsigned kWarp = 32;
constexpr unsigned kMostThreads = 1024;
constexpr unsigned char kPoison = 0xff;  // NaN in every floating point format

// `size` bytes between two pages that fault.
char* guarded(size_t size) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t whole = (size + page - 1) / page * page;
  void* raw = mmap(nullptr, whole + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED || mprotect(static_cast<char*>(raw) + page, whole, PROT_READ | PROT_WRITE) != 0) {
    std::perror("simt: no memory for a stack");
    std::abort();
  }
  return static_cast<char*>(raw) + page;
}

struct Copy {
  void* shared;
  const void* global;
  size_t size, bytes;
};

enum class State { ready, at_barrier, in_warp_operation, done };

struct Fiber {
  unsigned thread = 0;
  State state = State::done;
  bool started = false;  // stands in fiber_main's loop
  ucontext_t first;
  jmp_buf resume;
  char* stack = nullptr;
  const char* operation = nullptr;
  void* brought = nullptr;
  std::vector<Copy> open;                // copies since the last commit
  std::deque<std::vector<Copy>> groups;  // committed, oldest first
};

struct Machine {
  std::deque<Fiber> fibers;
  Fiber* current = nullptr;
  jmp_buf scheduler;
  const std::function<void()>* body = nullptr;
  Dim3 grid, block, block_index;
  char* shared_arena = nullptr;
  char* shared = nullptr;
  unsigned threads = 0, waiting = 0, done = 0;
  bool failed = false;
  std::string error;
  std::mt19937_64 random;
  uint64_t ready[kMostThreads / 64];

  void set_ready(unsigned thread) {
    fibers[thread].state = State::ready;
    ready[thread / 64] |= uint64_t{1} << thread % 64;
  }
};

thread_local Machine machine;

// Back to the scheduler, until it picks this fiber again.
void pause() {
  Fiber& self = *machine.current;
  if (_setjmp(self.resume) == 0) _longjmp(machine.scheduler, 1);
}

void fiber_main() {
  for (;;) {
    (*machine.body)();
    Fiber& self = *machine.current;
    self.state = State::done;
    ++machine.done;
    if (!self.open.empty() || !self.groups.empty()) fail("a thread ended without waiting for its asynchronous copies");
    pause();
  }
}

void run(Fiber& fiber) {
  machine.current = &fiber;
  machine.ready[fiber.thread / 64] &= ~(uint64_t{1} << fiber.thread % 64);
  if (_setjmp(machine.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  if (fiber.stack == nullptr) fiber.stack = guarded(kStack);
  getcontext(&fiber.first);
  fiber.first.uc_stack.ss_sp = fiber.stack;
  fiber.first.uc_stack.ss_size = kStack;
  fiber.first.uc_link = nullptr;
  makecontext(&fiber.first, fiber_main, 0);
  setcontext(&fiber.first);
}

// The next thread to run by the schedule, or -1 where none can.
int pick() {
  const int words = static_cast<int>((machine.threads + 63) / 64);
  switch (settings().schedule) {
    case Schedule::forward:
      for (int i = 0; i < words; ++i)
        if (machine.ready[i] != 0) return i * 64 + __builtin_ctzll(machine.ready[i]);
      return -1;
    case Schedule::reverse:
      for (int i = words - 1; i >= 0; --i)
        if (machine.ready[i] != 0) return i * 64 + 63 - __builtin_clzll(machine.ready[i]);
      return -1;
    case Schedule::shuffled:
      break;
  }
  // The first that can run from a random one on, in a ring.
  const unsigned start = static_cast<unsigned>(machine.random() % machine.threads);
  for (int i = 0; i <= words; ++i) {
    const unsigned word = (start / 64 + static_cast<unsigned>(i)) % static_cast<unsigned>(words);
    uint64_t bits = machine.ready[word];
    if (i == 0) bits &= ~uint64_t{0} << start % 64;
    if (bits != 0) return static_cast<int>(word * 64 + static_cast<unsigned>(__builtin_ctzll(bits)));
  }
  return -1;
}

std::string describe_stuck() {
  std::string text = "deadlock: ";
  unsigned at_barrier = 0;
  const Fiber* in_operation = nullptr;
  for (unsigned i = 0; i < machine.threads; ++i) {
    at_barrier += machine.fibers[i].state == State::at_barrier;
    if (in_operation == nullptr && machine.fibers[i].state == State::in_warp_operation)
      in_operation = &machine.fibers[i];
  }
  text += std::to_string(at_barrier) + " of " + std::to_string(machine.threads) + " threads wait at a barrier, " +
          std::to_string(machine.done) + " have ended";
  if (in_operation != nullptr)
    text += ", thread " + std::to_string(in_operation->thread) + " waits for its warp in " + in_operation->operation;
  return text;
}

bool run_block() {
  std::memset(machine.shared, kPoison, static_cast<size_t>(machine.shared_arena + kMostShared - machine.shared));
  machine.waiting = machine.done = 0;
  std::memset(machine.ready, 0, sizeof machine.ready);
  for (unsigned i = 0; i < machine.threads; ++i) machine.set_ready(i);
  while (machine.done < machine.threads) {
    const int next = pick();
    if (next < 0) {
      machine.error = describe_stuck();
      machine.failed = true;
    } else {
      run(machine.fibers[static_cast<size_t>(next)]);
    }
    if (machine.failed) return false;
  }
  return true;
}

void perform(const Copy& copy) {
  std::memcpy(copy.shared, copy.global, copy.bytes);
  std::memset(static_cast<char*>(copy.shared) + copy.bytes, 0, copy.size - copy.bytes);
}

}  // namespace

Settings& settings() {
  static Settings settings;
  return settings;
}

Dim3 thread_index() { return {machine.current->thread, 0, 0}; }
Dim3 block_index() { return machine.block_index; }
Dim3 block_size() { return machine.block; }
Dim3 grid_size() { return machine.grid; }
void* shared_memory() { return machine.shared; }

void fail(const char* what) {
  machine.failed = true;
  machine.error = what;
  machine.current->started = false;  // its stack is abandoned where it stands
  _longjmp(machine.scheduler, 1);
}

void barrier() {
  machine.current->state = State::at_barrier;
  if (++machine.waiting == machine.threads) {
    machine.waiting = 0;
    for (unsigned i = 0; i < machine.threads; ++i) machine.set_ready(i);
  }
  pause();
}

void warp_operation(const char* name, void* mine, void (*perform)(void* const (&lanes)[32])) {
  Fiber& self = *machine.current;
  self.state = State::in_warp_operation;
  self.operation = name;
  self.brought = mine;
  const unsigned first = self.thread / kWarp * kWarp;
  void* lanes[kWarp];
  bool all = true;
  for (unsigned i = 0; i < kWarp; ++i) {
    const Fiber& lane = machine.fibers[first + i];
    all = all && lane.state == State::in_warp_operation;
    if (lane.state == State::in_warp_operation && std::strcmp(lane.operation, name) != 0) fail("a warp has diverged");
    lanes[i] = lane.brought;
  }
  if (all) {
    if (perform != nullptr) perform(lanes);
    for (unsigned i = 0; i < kWarp; ++i) machine.set_ready(first + i);
  }
  pause();
}

void copy_async(void* shared, const void* global, int size, int bytes) {
  char* const begin = static_cast<char*>(shared);
  if (begin < machine.shared || begin + size > machine.shared_arena + kMostShared)
    fail("an asynchronous copy leaves shared memory");
  if (reinterpret_cast<uintptr_t>(shared) % static_cast<size_t>(size) != 0 ||
      reinterpret_cast<uintptr_t>(global) % static_cast<size_t>(size) != 0)
    fail("an asynchronous copy is misaligned");
  if (bytes < 0 || bytes > size) fail("an asynchronous copy reads more bytes than it writes");
  std::memset(shared, kPoison, static_cast<size_t>(size));
  machine.current->open.push_back({shared, global, static_cast<size_t>(size), static_cast<size_t>(bytes)});
}

void copy_async_commit() {
  machine.current->groups.push_back(std::move(machine.current->open));
  machine.current->open.clear();
}

void copy_async_wait(int groups) {
  auto& pending = machine.current->groups;
  while (pending.size() > static_cast<size_t>(groups)) {
    for (const Copy& copy : pending.front()) perform(copy);
    pending.pop_front();
  }
}

const char* launch(Dim3 grid, Dim3 block, size_t shared, const std::function<void()>& body) {
  Machine& m = machine;
  m.threads = block.x;
  if (block.y != 1 || block.z != 1 || grid.y != 1 || grid.z != 1) return "blocks and grids have one dimension here";
  if (m.threads == 0 || m.threads % kWarp != 0 || m.threads > kMostThreads)
    return "a block must be 1 to 32 whole warps";
  if (shared > settings().shared) return "more shared memory than a block may have";
  if (m.shared_arena == nullptr) {
    // A whole number of pages, so that its last byte is the last before the guard.
    static_assert(kMostShared % 4096 == 3072);
    m.shared_arena = guarded(kMostShared) + 1024;
  }
  m.shared = m.shared_arena + kMostShared - (shared + 15) / 16 * 16;
  m.grid = grid;
  m.block = block;
  m.body = &body;
  m.failed = false;
  m.random.seed(settings().seed);
  while (m.fibers.size() < m.threads) {
    const size_t thread = m.fibers.size();
    m.fibers.emplace_back().thread = static_cast<unsigned>(thread);
  }

  std::vector<unsigned> order(grid.x);
  for (unsigned i = 0; i < grid.x; ++i) order[i] = i;
  if (settings().schedule == Schedule::reverse) std::reverse(order.begin(), order.end());
  if (settings().schedule == Schedule::shuffled) std::shuffle(order.begin(), order.end(), m.random);
  for (const unsigned index : order) {
    m.block_index = {index, 0, 0};
    if (run_block()) continue;
    for (Fiber& fiber : m.fibers) {  // abandoned where they stand
      fiber.started = false;
      fiber.open.clear();
      fiber.groups.clear();
    }
    m.current = nullptr;
    return m.error.c_str();
  }
  return nullptr;
}

}  // namespace simt
