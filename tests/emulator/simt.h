// A CUDA device in one thread of the CPU, to test kernels without a GPU.
//
// Blocks run one after the other. Every thread of a block is a fiber, whose stack is between guard pages. A fiber runs
// until it waits: for the block at a barrier, for its warp at a warp operation. Then the schedule selects another
// fiber: `forward` the first one that can run, so that a warp runs as far ahead of the others as barriers allow;
// `reverse` the last one; `shuffled` a random one, by a seed. Blocks have the same order.
//
// Shared memory has exactly the size given at the launch, ends at a guard page, and is full of NaNs at the start of a
// block. The target of an asynchronous copy is NaN from its issue until its thread has waited for it. So a read that is
// too early gives NaN, and so does a read of the data that the copy overwrites.
//
// A kernel that no GPU could run fails at its launch: a barrier or warp operation that some threads never reach, warps
// of fewer than 32 threads, misaligned copies, more shared memory than a launch may have.
//
// What this cannot show is speed, and what a GPU's memory model allows beyond these orders.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace simt {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr Dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// ---- for kernels

Dim3 thread_index();
Dim3 block_index();
Dim3 block_size();
Dim3 grid_size();
void* shared_memory();
void barrier();
// Called by all 32 threads of a warp with the same name. Calls perform once, with the argument `mine` of every lane.
void warp_operation(const char* name, void* mine, void (*perform)(void* const (&lanes)[32]));
void copy_async(void* shared, const void* global, int size, int bytes);
void copy_async_commit();
void copy_async_wait(int groups);
// Ends the launch with this error.
[[noreturn]] void fail(const char* what);

// ---- for launches

enum class Schedule : int { forward, reverse, shuffled };

struct Settings {
  Schedule schedule = Schedule::forward;
  uint64_t seed = 0;
  // The properties of the device, by which launchers choose tiles, splits and what stays on the chip.
  int multiprocessors = 4;
  size_t shared = size_t{99} << 10;  // the most per block: the minimum of all GPUs from sm_80 on
};
Settings& settings();

// The largest value of `shared`, that of sm_90.
constexpr size_t kMostShared = 227 << 10;

// Runs body in every thread of every block. Returns null, or what is wrong with the kernel.
const char* launch(Dim3 grid, Dim3 block, size_t shared, const std::function<void()>& body);

}  // namespace simt
