// A CUDA device in one thread of the CPU, to know that kernels are right where there is no GPU.
//
// A block runs at a time; each of its threads is a fiber with a stack of its own between guard pages. A fiber runs
// until it waits: at a barrier for the block, at a warp operation for its warp; then the schedule picks another.
// `forward` always picks the first that can run, so that a warp runs as far ahead of the others as its barriers let it;
// `reverse` the last; `shuffled` any, by a seed. Blocks go in the same order. Shared memory is exactly as large as the
// launch asked for, ends at a guard page and starts every block full of NaNs. What an asynchronous copy will write is
// NaN from the copy's issue on, and only there when its thread has waited: so it shows both who reads too early and who
// is still reading what is overwritten.
//
// A kernel that no GPU could run is an error of its launch: a barrier or a warp operation that some of its threads
// never reach, warps of less than 32 threads, misaligned copies, more shared memory than the launch may have.
//
// What this cannot show: speed, and what a GPU's memory model allows beyond these orders.
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
// All 32 threads of the warp come here with the same name; perform gets what each of them brought, by lane, once.
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
  // What kernels are told, and choose tiles, splits and what stays on the chip by.
  int multiprocessors = 4;
  size_t shared = size_t{99} << 10;  // a block's, if it asks: the least of all GPUs from sm_80 on
};
Settings& settings();

// The most that `shared` can be: sm_90's.
constexpr size_t kMostShared = 227 << 10;

// Runs body in every thread of every block; returns what is wrong with it, or null.
const char* launch(Dim3 grid, Dim3 block, size_t shared, const std::function<void()>& body);

}  // namespace simt
