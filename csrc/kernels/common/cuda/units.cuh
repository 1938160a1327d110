// How kernels that go through memory once divide it among threads.
//
// Rows of elements are divided into units. If rows are aligned to vectors, so are units. The units of a thread are one
// grid apart. A thread loads several units before it computes, so that enough loads are in flight. The last unit of a
// row may be incomplete; elements past the end of the row are neither read nor written. Indices have 64 bits.
#pragma once

#include "formulas.cuh"
#include "launch.h"

namespace fastops::cuda {
namespace {

constexpr int kThreads = 256;
// Bytes of one operand that a thread loads before it computes. Not measured.
constexpr int kBytesUnderWay = 64;
// Blocks per multiprocessor, at least as many as fit. Not measured.
constexpr int kBlocksPerMultiprocessor = 8;

struct Units {
  int64_t units, per_row, cols;
  int64_t rows;
};

// The place of a unit.
struct Place {
  int64_t row, col;
  int count;  // its number of elements
};

template <int n>
__device__ inline Place place_of(int64_t unit, const Units& units) {
  Place place{0, unit, n};
  if (units.rows > 1) {
    // A 32-bit division costs a quarter of a 64-bit one.
    place.row = units.units <= UINT32_MAX ? static_cast<uint32_t>(unit) / static_cast<uint32_t>(units.per_row)
                                          : unit / units.per_row;
    place.col = unit - place.row * units.per_row;
  }
  place.col *= n;
  const int64_t left = units.cols - place.col;
  if (left < n) place.count = static_cast<int>(left);
  return place;
}

// Calls load(b, place) for several units, then compute(b, place) for these, until all units are done.
template <int n, int size>
constexpr int kBatch = kBytesUnderWay > n* size ? kBytesUnderWay / (n * size) : 1;
template <int n, int size, class Load, class Compute>
__device__ inline void for_units(const Units& units, Load load, Compute compute) {
  constexpr int batch = kBatch<n, size>;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; first < units.units;
       first += step * batch) {
    Place places[batch];
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      const int64_t unit = first + b * step;
      if (unit < units.units) {
        places[b] = place_of<n>(unit, units);
        load(b, places[b]);
      }
    }
#pragma unroll
    for (int b = 0; b < batch; ++b)
      if (first + b * step < units.units) compute(b, places[b]);
  }
}

template <int n>
Units units_of(int64_t rows, int64_t cols) {
  const int64_t per_row = quotient_up(cols, n);
  return {rows * per_row, per_row, cols, rows};
}

// Where a run goes: a stream of a device with `chip` multiprocessors.
struct Device {
  int64_t chip;
  Stream stream;
};

// Launches a grid that fills the chip, or a smaller one for less work.
template <int n, class S, class Task>
Status launch_units(const char* name, void (*kernel)(Task), const Task& task, const Units& units, const Device& on) {
  const int64_t wanted = quotient_up(units.units, int64_t{kThreads} * kBatch<n, sizeof(S)>);
  return launch({{name}, smaller(wanted, on.chip * kBlocksPerMultiprocessor), kThreads, 0, on.stream}, kernel, task);
}

}  // namespace
}  // namespace fastops::cuda
