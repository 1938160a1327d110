// Convolutions as matrix products, by the loop of gemm.cuh, without a matrix of patches in memory. A loader reads each
// element of a tile from the image in place; elements outside the image are zero.
//
//   output   C[p, n] = sum over taps t and channels c of image[b, c, p step + origin + t tap_step] filter[n, t, c]
//   weight   C[k, (t, c)] = sum over positions p of g[b, k, p] image[b, c, p step + origin + t tap_step]
//
// The forward pass is the first product. So is the gradient of the input, for each phase: the positions with the same
// remainder by the stride read the same taps, which are a fixed distance apart in grad_y. Taps that a phase does not
// read cost nothing. Channels are innermost in k (in n for the weight gradient), so a vector of channels belongs to one
// tap. For channels first, the output product is transposed, so that rows of C are contiguous in memory.
#pragma once

#include "../../gemm/cuda/gemm.cuh"
#include "../conv.h"

namespace fastops::cuda {
namespace {

// n / d for 0 <= n < 2^31 by a multiplication (Granlund and Montgomery). A division takes a GPU some twenty
// instructions.
struct Divisor {
  uint32_t divisor, multiplier, shift;

  __host__ __device__ int count() const { return static_cast<int>(divisor); }
  __device__ int quotient(int n) const {
    const uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(static_cast<uint32_t>(n)) * multiplier >> 32);
    return static_cast<int>((high + static_cast<uint32_t>(n)) >> shift);
  }
};
__host__ __device__ inline Divisor divisor_of(int d) {
  const uint32_t divisor = d < 1 ? 1 : static_cast<uint32_t>(d);
  uint32_t shift = 0;
  while ((uint64_t{1} << shift) < divisor) ++shift;
  const uint64_t multiplier = (uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor) / divisor + 1;
  return {static_cast<uint32_t>(d), static_cast<uint32_t>(multiplier), shift};
}

// n / d for non-negative numbers that rarely need 64 bits.
__host__ __device__ inline int64_t short_quotient(int64_t n, int64_t d) {
  if ((n | d) >> 32 == 0) return static_cast<uint32_t>(n) / static_cast<uint32_t>(d);
  return n / d;
}

// ---- geometry

// The axes of a ConvGeometry in int (fits_int). gradient: the result is the gradient of the input.
struct ConvShape {
  int in[3], out[3], kernel[3], stride[3], padding[3], dilation[3];
  bool gradient;
};

// The number of phases of an axis.
__host__ __device__ inline int phases_of(const ConvShape& s, int i) {
  if (!s.gradient) return 1;
  return s.stride[i] < s.in[i] ? s.stride[i] : s.in[i];
}

// One axis of a phase. Position j is the element first + j jump of the result. Its tap t is tap_first + t tap_jump of
// the filter, and reads element j step + origin + t tap_step, which may be outside [0, size).
struct ConvAxis {
  int positions, first, jump;
  int taps, tap_first, tap_jump;
  int step, origin, tap_step, size;
};
__host__ __device__ inline ConvAxis axis_of(const ConvShape& s, int i, int phase) {
  const int stride = s.stride[i], dilation = s.dilation[i], kernel = s.kernel[i];
  if (!s.gradient) return {s.out[i], 0, 1, kernel, 0, 1, stride, -s.padding[i], dilation, s.in[i]};
  // The taps r of this phase: phase + padding - r dilation is a multiple of the stride.
  const auto next = [&](int r) {
    while (r < kernel && (phase + s.padding[i] - r * dilation) % stride != 0) ++r;
    return r;
  };
  const int tap = next(0), jump = next(tap + 1) - tap;  // past the end if there is only one tap
  const int taps = tap < kernel ? (kernel - 1 - tap) / jump + 1 : 0;
  return {(s.in[i] - phase + stride - 1) / stride,
          phase,
          stride,
          taps,
          tap,
          jump,
          1,
          (phase + s.padding[i] - tap * dilation) / stride,
          -(jump * dilation / stride),
          s.out[i]};
}

// The axes of a block's phase, in shared memory, with divisors for their sizes.
struct ConvWindow {
  ConvAxis axis[3];
  Divisor positions[3], taps[3];

  __device__ int64_t image_positions() const {
    return int64_t{axis[0].positions} * axis[1].positions * axis[2].positions;
  }
  __device__ int tap_count() const { return axis[0].taps * axis[1].taps * axis[2].taps; }
};

// Fills the window, by three threads of the block.
__device__ inline void open_window(ConvWindow* window, const ConvShape& shape, int phase) {
  if (threadIdx.x < 3) {
    const int i = static_cast<int>(threadIdx.x);
    for (int j = 2; j > i; --j) phase /= phases_of(shape, j);
    const ConvAxis axis = axis_of(shape, i, phase % phases_of(shape, i));
    window->axis[i] = axis;
    window->positions[i] = divisor_of(axis.positions);
    window->taps[i] = divisor_of(axis.taps);
  }
  __syncthreads();
}

// A position: an image, and a coordinate along each axis.
struct ConvPosition {
  int64_t image;
  int at[3];
};
__device__ inline ConvPosition position_at(const ConvWindow& w, int64_t index) {
  ConvPosition p;
#pragma unroll
  for (int i = 2; i >= 0; --i) {
    const int64_t rest = short_quotient(index, w.axis[i].positions);
    p.at[i] = static_cast<int>(index - rest * w.axis[i].positions);
    index = rest;
  }
  p.image = index;
  return p;
}
__device__ inline void advance(ConvPosition& p, const ConvWindow& w, int distance) {
#pragma unroll
  for (int i = 2; i >= 0; --i) {
    const int sum = p.at[i] + distance;
    distance = w.positions[i].quotient(sum);
    p.at[i] = sum - distance * w.axis[i].positions;
  }
  p.image += distance;
}

// A tap and a channel, from an index into (taps, channels).
struct ConvTap {
  int channel, at[3];
};
__device__ inline void advance(ConvTap& t, const ConvWindow& w, Divisor channels, int distance) {
  const int sum = t.channel + distance;
  distance = channels.quotient(sum);
  t.channel = sum - distance * channels.count();
#pragma unroll
  for (int i = 2; i >= 0; --i) {
    const int tap = t.at[i] + distance;
    distance = w.taps[i].quotient(tap);
    t.at[i] = tap - distance * w.axis[i].taps;
  }
}

// ---- operands

// The operands of a loader: patches of an image (positions x (taps, channels)), filters (filters x (taps, channels)),
// or pixels of an image (positions x channels).
enum class ConvRole : int { patches, filters, pixels };

// Element (b, at, c) of group g is at data + g group_stride + b image_stride + sum at stride + c channel_stride. A
// filter is an image whose pixels are its taps.
template <class S>
struct ConvOperand {
  const S* data;
  const S* saved;  // y of the activation, for an operand that is an incoming gradient; in the layout of data
  int64_t group_stride, image_stride, stride[3], channel_stride;
  Divisor channels;  // per group
  Path path;
};

// f' of a fused activation, computed from y.
template <class S>
struct Slope {
  ActivationKind kind;
  Parameters<S> parameters;
};

// The Loader (gemm.cuh) for an operand of a convolution. kLast: channels are contiguous, else positions are; the
// threads of a warp step in that direction. kKIsPosition: the sum is over positions.
//
// The elements of a thread all have the same tap and channels and different positions (kLast), or the reverse. 16-bit
// numbers are loaded in units of eight channels, others one by one. If channels are contiguous in both memories
// (Path::vectors), they are loaded as vectors.
template <class TileLayout, int threads, Loads loads, ConvRole role, bool kLast, bool kKIsPosition>
struct ConvLoader {
  using S = typename TileLayout::S;
  static constexpr int kRows = TileLayout::kRows, kCols = TileLayout::kCols;
  static constexpr bool kRowsArePositions = TileLayout::kKMajor != kKIsPosition;
  static constexpr bool kHasVectors = kLast && kRowsArePositions;
  static constexpr bool kRowsFastest = kLast != kRowsArePositions;
  static constexpr int kWidth = kVector<S>, kUnit = sizeof(S) < 4 ? kWidth : 1;
  static constexpr int kVectors = kRows * kCols / threads / kWidth, kUnits = kRows * kCols / threads / kUnit;
  static constexpr bool kRegisters = loads != Loads::async, kFolded = loads == Loads::folded;
  static constexpr int kPlaces = kKIsPosition || !kLast ? 1 : kUnits;
  static_assert(kUnit == 1 || kRowsArePositions, "a unit is a vector of channels in a row of the tile");
  static_assert(kVectors * kWidth * threads == kRows * kCols && threads % kRows == 0);
  static_assert(threads % (kCols / kWidth) == 0 && (kUnit > 1 || threads % kCols == 0));

  // The first tap of a position: its address, which is only used if the tap is inside the image, and its coordinates.
  struct Place {
    const S* data;
    int at[3];
  };
  // The distance of a tap and channel from that first tap.
  struct Reach {
    int64_t offset;
    int at[3];
  };

  const ConvOperand<S>& operand;
  const ConvWindow& window;
  const Slope<S>* slope;
  const S* group;  // the first element of the group
  int row, col, row_step, col_step;
  int mn_left;
  int64_t k_left;
  ConvTap tap;            // of this thread's first unit
  ConvPosition position;  // of this thread's first unit, if kKIsPosition
  Place places[kPlaces];  // otherwise
  alignas(16) S held[kRegisters ? kUnits : 1][kUnit];
  alignas(16) S held_saved[kFolded ? kUnits : 1][kUnit];

  __device__ ConvLoader(const ConvOperand<S>& operand, const ConvWindow& window, const Slope<S>* slope, int64_t group,
                        int64_t mn_begin, int64_t mn_end, int64_t k_begin, int64_t k_end)
      : operand(operand),
        window(window),
        slope(slope),
        group(operand.data + group * operand.group_stride),
        mn_left(static_cast<int>(mn_end - mn_begin < TileLayout::kExtent ? mn_end - mn_begin : TileLayout::kExtent)),
        k_left(k_end - k_begin) {
    const int thread = static_cast<int>(threadIdx.x);
    const int width = kHasVectors && operand.path == Path::vectors ? kWidth : kUnit;
    row = kRowsFastest ? thread % kRows : thread * width / kCols;
    col = kRowsFastest ? thread / kRows * width : thread * width % kCols;
    row_step = kRowsFastest ? 0 : threads * width / kCols;
    col_step = kRowsFastest ? threads / kRows * width : 0;
    if constexpr (kKIsPosition) {
      tap = {};
      advance_tap(tap, static_cast<int>(mn_begin) + first_channel());
      position = position_at(window, k_begin);
      advance(position, window, first_position());
    } else {
      tap = {};
      advance_tap(tap, static_cast<int>(k_begin) + first_channel());
      if constexpr (role == ConvRole::filters) {
#pragma unroll
        for (int u = 0; u < kPlaces; ++u) {
          const int index = first_position() + u * position_step();
          places[u] = place_of({mn_begin + index, {}}, index < mn_left);
        }
      } else {
        const ConvPosition begin = position_at(window, mn_begin);
#pragma unroll
        for (int u = 0; u < kPlaces; ++u) {
          const int index = first_position() + u * position_step();
          ConvPosition p = begin;
          advance(p, window, index);
          places[u] = place_of(p, index < mn_left);
        }
      }
    }
  }

  __device__ void fetch(S* stage) {
    const int depth = static_cast<int>(k_left < TileLayout::kDepth ? k_left : TileLayout::kDepth);
    S* const to = stage + row * TileLayout::kRow + col;
    const int to_step = row_step * TileLayout::kRow + col_step;
    if (kHasVectors && operand.path == Path::vectors) {
      if constexpr (kHasVectors) {
        const bool exists = first_channel() < (kKIsPosition ? mn_left : depth);
        const Reach reach = reach_of(tap);
#pragma unroll(kKIsPosition ? 1 : kVectors)  // finding a position needs registers
        for (int u = 0; u < kVectors; ++u) {
          const Place place = place_at(u, depth);
          const bool inside = exists && contains(place, reach);
          cp_async_16(to + u * to_step, inside ? place.data + reach.offset : operand.data, inside ? 16 : 0);
        }
      }
    } else if (sizeof(S) >= 4 && operand.path == Path::elements) {
      if constexpr (sizeof(S) >= 4)
        for_elements(depth, [&](int u, int, bool inside, const S* from) {
          cp_async_element<sizeof(S)>(to + u * to_step, inside ? from : operand.data, inside ? sizeof(S) : 0);
        });
    } else if constexpr (kRegisters) {
      for_elements(depth, [&](int u, int i, bool inside, const S* from) {
        held[u][i] = inside ? *from : S{};
        if constexpr (kFolded)
          if (slope->kind != ActivationKind::identity)
            held_saved[u][i] = inside ? operand.saved[from - operand.data] : S{};
      });
    }
    if constexpr (kKIsPosition)
      advance(position, window, TileLayout::kDepth);
    else
      advance_tap(tap, TileLayout::kDepth);
    k_left -= TileLayout::kDepth;
  }

  __device__ void place(S* stage) {
    if constexpr (kRegisters) {
      if (operand.path != Path::registers) return;
      if constexpr (kFolded) {
        if (slope->kind != ActivationKind::identity)
          with_folded(slope->kind, [&](auto kind) {
            using V = Vec<Compute<S>>;
#pragma unroll
            for (int u = 0; u < kUnits; ++u)
#pragma unroll
              for (int i = 0; i < kUnit; ++i)
                decltype(kind)::backward(V::load(held[u] + i), V::load(held_saved[u] + i), slope->parameters)
                    .store(held[u] + i);
          });
      }
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        S* const to = stage + (row + u * row_step) * TileLayout::kRow + col + u * col_step;
        if constexpr (kUnit > 1)
          store_unit(to, held[u], kUnit, true);
        else
          *to = held[u][0];
      }
    }
  }

 private:
  __device__ int first_position() const { return kRowsArePositions ? row : col; }
  __device__ int position_step() const { return kRowsArePositions ? row_step : col_step; }
  __device__ int first_channel() const { return kRowsArePositions ? col : row; }
  __device__ int channel_step() const { return kRowsArePositions ? col_step : row_step; }

  __device__ void advance_tap(ConvTap& t, int distance) const {
    if constexpr (role == ConvRole::pixels)
      t.channel += distance;
    else
      advance(t, window, operand.channels, distance);
  }
  // Elements between successive taps along an axis.
  __device__ int reach_step(int i) const {
    return role == ConvRole::patches ? window.axis[i].tap_step : window.axis[i].tap_jump;
  }
  __device__ Reach reach_of(const ConvTap& t) const {
    Reach reach{t.channel * operand.channel_stride, {}};
    if constexpr (role != ConvRole::pixels)
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        reach.at[i] = t.at[i] * reach_step(i);
        reach.offset += reach.at[i] * operand.stride[i];
      }
    return reach;
  }
  // Moves on to the next channel, or to the first channel of the next tap.
  __device__ void step(ConvTap& t, Reach& reach) const {
    ++t.channel;
    reach.offset += operand.channel_stride;
    if constexpr (role != ConvRole::pixels)
      if (t.channel == operand.channels.count()) {
        advance_tap(t, 0);
        reach = reach_of(t);
      }
  }

  __device__ Place place_of(const ConvPosition& p, bool exists) const {
    Place place{group + p.image * operand.image_stride, {}};
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const ConvAxis& axis = window.axis[i];
      int at = axis.tap_first;
      if constexpr (role == ConvRole::patches) at = p.at[i] * axis.step + axis.origin;
      if constexpr (role == ConvRole::pixels) at = p.at[i];
      place.data += at * operand.stride[i];
      place.at[i] = at;
    }
    if (!exists) place.at[0] = INT32_MIN / 2;  // outside for every tap
    return place;
  }
  __device__ Place place_at(int u, int depth) const {
    if constexpr (kKIsPosition) {
      ConvPosition p = position;
      const int distance = kLast ? u * position_step() : 0;
      if (distance > 0) advance(p, window, distance);
      return place_of(p, first_position() + distance < depth);
    } else {
      return places[kLast ? u : 0];
    }
  }
  __device__ bool contains(const Place& place, const Reach& reach) const {
    if constexpr (role != ConvRole::patches) return place.at[0] >= 0;
    bool inside = true;
#pragma unroll
    for (int i = 0; i < 3; ++i)
      inside = inside && static_cast<unsigned>(place.at[i] + reach.at[i]) < static_cast<unsigned>(window.axis[i].size);
    return inside;
  }

  // body(unit, element of the unit, whether it exists, its address)
  template <class Body>
  __device__ void for_elements(int depth, Body body) const {
    const int channels = (kKIsPosition ? mn_left : depth) - first_channel();
    if constexpr (kLast) {
      ConvTap t = tap;
      Reach reach = reach_of(t);
      Place now[kKIsPosition ? kUnits : 1];
      if constexpr (kKIsPosition && kUnit > 1)
#pragma unroll
        for (int u = 0; u < kUnits; ++u) now[u] = place_at(u, depth);
#pragma unroll
      for (int i = 0; i < kUnit; ++i) {
        if (i > 0) step(t, reach);
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
          const Place place = kKIsPosition && kUnit > 1 ? now[u] : place_at(u, depth);
          body(u, i, i < channels && contains(place, reach), place.data + reach.offset);
        }
      }
    } else {
      const Place place = place_at(0, depth);
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        ConvTap t = tap;
        if (u > 0) advance_tap(t, u * channel_step());
        Reach reach = reach_of(t);
#pragma unroll
        for (int i = 0; i < kUnit; ++i) {
          if (i > 0) step(t, reach);
          body(u, i, u * channel_step() + i < channels && contains(place, reach), place.data + reach.offset);
        }
      }
    }
  }
};

// ---- the epilogue

// The result, with strides like those of an operand, and the z, bias and activation of an output.
template <class S>
struct ConvTarget {
  int64_t group_stride, image_stride, stride[3], channel_stride;
  const S* bias;  // nullable
  ActivationKind kind;
  Parameters<S> parameters;
  S* y;
  S* z;        // nullable
  bool pairs;  // y and z are aligned to pairs of elements
};

// Stores two neighbours of C to two places of y; a negative second place means that there is none. channel and
// second_channel are the channels of their biases.
template <class S>
__device__ inline void finish(const ConvTarget<S>& target, int64_t at, int64_t second_at, int64_t channel,
                              int64_t second_channel, Pair<Compute<S>> value) {
  if (target.bias != nullptr) {
    value.first += to_compute(target.bias[channel]);
    if (second_at >= 0) value.second += to_compute(target.bias[second_channel]);
  }
  const bool neighbours = second_at == at + 1;
  const auto store = [&](S* to) {
    store_pair(to + at, value, neighbours, target.pairs && at % 2 == 0);
    if (!neighbours && second_at >= 0) to_storage(value.second, to + second_at);
  };
  if (target.z != nullptr) store(target.z);
  if (target.kind != ActivationKind::identity) value = activate<S>(target.kind, target.parameters, value);
  store(target.y);
}

// ---- the kernels

enum class ConvProduct : int { output, weight };

// C is [m, n] for every phase and group. If k is split, `partial` has the sums of every part,
// [splits][phases][groups][m][n rounded up to even], followed by the row sums of A, [splits][groups][m].
template <class S>
struct ConvTask {
  ConvShape shape;
  int64_t batch;
  int phases, groups;
  int64_t m, n;  // of the largest phase
  ConvOperand<S> a, b;
  Slope<S> slope;  // of the operand that is an incoming gradient
  ConvTarget<S> target;
  S* row_sums;  // nullable: [groups][m], the sums of the rows of A
  Compute<S>* partial;
  int tiles_m, tiles_n, splits;
  int64_t k_per_split;
};

// The sizes of the product of a phase.
template <ConvProduct product, bool kLast, class S>
struct ConvExtents {
  static constexpr bool kWeight = product == ConvProduct::weight;
  int64_t m, n, k;

  __device__ ConvExtents(const ConvTask<S>& task, const ConvWindow& window) : m(task.m), n(task.n) {
    const int64_t positions = task.batch * window.image_positions();
    if constexpr (kWeight) {
      k = positions;
    } else {
      (kLast ? m : n) = positions;
      k = int64_t{window.tap_count()} * task.a.channels.count();
    }
  }
};

// The offset in y of row `index` of C (row_of), and the further offset of column `index` (column_of).
template <class S>
__device__ inline int64_t position_offset(const ConvTarget<S>& target, const ConvWindow& window, int64_t index) {
  const ConvPosition p = position_at(window, index);
  int64_t offset = p.image * target.image_stride;
#pragma unroll
  for (int i = 0; i < 3; ++i) offset += (window.axis[i].first + p.at[i] * window.axis[i].jump) * target.stride[i];
  return offset;
}
template <class S>
__device__ inline int64_t tap_offset(const ConvTarget<S>& target, const ConvWindow& window, Divisor channels,
                                     int64_t index) {
  ConvTap t{};
  advance(t, window, channels, static_cast<int>(index));
  int64_t offset = t.channel * target.channel_stride;
#pragma unroll
  for (int i = 0; i < 3; ++i) offset += t.at[i] * target.stride[i];
  return offset;
}
template <ConvProduct product, bool kLast, class S>
__device__ inline int64_t row_of(const ConvTask<S>& task, const ConvWindow& window, int group, int64_t index) {
  const int64_t begin = group * task.target.group_stride;
  if constexpr (product == ConvProduct::weight) return begin + index * task.target.image_stride;
  if constexpr (kLast) return begin + position_offset(task.target, window, index);
  return begin + index * task.target.channel_stride;
}
template <ConvProduct product, bool kLast, class S>
__device__ inline int64_t column_of(const ConvTask<S>& task, const ConvWindow& window, int64_t index) {
  if constexpr (product == ConvProduct::weight) return tap_offset(task.target, window, task.b.channels, index);
  if constexpr (kLast) return index * task.target.channel_stride;
  return position_offset(task.target, window, index);
}

// Shared memory: that of gemm.cuh, where the offsets of rows and columns follow the tile of C, and the window.
template <class Multiplier>
struct ConvShared {
  using C = typename Multiplier::C;
  static constexpr size_t kTables = Multiplier::kTileM * Stages<Multiplier>::kRow * sizeof(C);
  static constexpr size_t kAfter = kTables + (Multiplier::kTileM + Multiplier::kTileN) * sizeof(int64_t);
  static constexpr size_t kWindow = kAfter > Stages<Multiplier>::kBytes ? kAfter : Stages<Multiplier>::kBytes;
  static constexpr size_t kBytes = kWindow + sizeof(ConvWindow);
};

// kBlocksAtOnce for convolutions. Kernels that load through registers have none to spare.
template <class S, Loads loads>
constexpr int kConvBlocksAtOnce = loads == Loads::async ? kBlocksAtOnce<S> : 1;

template <class Multiplier, ConvProduct product, bool kLast, Loads loads>
__global__ void __launch_bounds__(Multiplier::kThreads, kConvBlocksAtOnce<typename Multiplier::S, loads>)
    conv_kernel(const __grid_constant__ ConvTask<typename Multiplier::S> task) {
  using S = typename Multiplier::S;
  using C = typename Multiplier::C;
  constexpr bool weight = product == ConvProduct::weight;
  constexpr int threads = Multiplier::kThreads, tile_m = Multiplier::kTileM, tile_n = Multiplier::kTileN;
  constexpr int tile_row = Stages<Multiplier>::kRow;

  // Successive blocks share positions, which are more than filters.
  int block = static_cast<int>(blockIdx.x);
  const auto take = [&](int count) {
    const int rest = block / count, value = block - rest * count;
    block = rest;
    return value;
  };
  int64_t m0, n0;
  if constexpr (!weight && kLast) {
    n0 = int64_t{take(task.tiles_n)} * tile_n;
    m0 = int64_t{take(task.tiles_m)} * tile_m;
  } else {
    m0 = int64_t{take(task.tiles_m)} * tile_m;
    n0 = int64_t{take(task.tiles_n)} * tile_n;
  }
  const int group = take(task.groups), phase = take(task.phases), split = block;

  char* const shared = static_cast<char*>(shared_memory());
  ConvWindow* const opened = reinterpret_cast<ConvWindow*>(shared + ConvShared<Multiplier>::kWindow);
  open_window(opened, task.shape, phase);
  const ConvWindow& window = *opened;
  const ConvExtents<product, kLast, S> extents(task, window);
  if (m0 >= extents.m || (n0 >= extents.n && n0 > 0)) return;
  const int64_t k_begin = split * task.k_per_split, k_rest = extents.k - k_begin;
  const int64_t k_end = k_begin + (k_rest < 0 ? 0 : k_rest < task.k_per_split ? k_rest : task.k_per_split);

  constexpr Loads others = loads == Loads::folded ? Loads::any : loads;
  constexpr ConvRole role_a = weight ? ConvRole::pixels : kLast ? ConvRole::patches : ConvRole::filters;
  constexpr ConvRole role_b = weight || !kLast ? ConvRole::patches : ConvRole::filters;
  constexpr bool slope_of_a = weight || kLast;
  ConvLoader<typename Multiplier::A, threads, slope_of_a ? loads : others, role_a, kLast || role_a == ConvRole::filters,
             weight>
      a(task.a, window, &task.slope, group, m0, extents.m, k_begin, k_end);
  ConvLoader<typename Multiplier::B, threads, slope_of_a ? others : loads, role_b, kLast || role_b == ConvRole::filters,
             weight>
      b(task.b, window, &task.slope, group, n0, extents.n, k_begin, k_end);
  Multiplier multiplier;
  const bool want_row_sum = task.row_sums != nullptr && n0 == 0;
  C row_sum = 0;
  multiply_tiles(multiplier, a, b, k_end - k_begin, reinterpret_cast<S*>(shared), want_row_sum, row_sum);

  const int64_t even_n = (task.n + 1) / 2 * 2;
  const int64_t slab = (int64_t{split} * task.phases + phase) * task.groups + group;
  const int64_t own_row = m0 + threadIdx.x;
  if (want_row_sum && static_cast<int>(threadIdx.x) < tile_m && own_row < extents.m) {
    if (task.splits > 1)
      task.partial[int64_t{task.splits} * task.phases * task.groups * task.m * even_n + slab * task.m + own_row] =
          row_sum;
    else
      to_storage(row_sum, task.row_sums + group * task.m + own_row);
  }

  C* const tile = reinterpret_cast<C*>(shared);
  int64_t* const rows = reinterpret_cast<int64_t*>(shared + ConvShared<Multiplier>::kTables);
  int64_t* const cols = rows + tile_m;
  multiplier.store(tile, tile_row);
  if (task.splits == 1) {
    for (int i = static_cast<int>(threadIdx.x); i < tile_m; i += threads)
      rows[i] = m0 + i < extents.m ? row_of<product, kLast>(task, window, group, m0 + i) : -1;
    for (int i = static_cast<int>(threadIdx.x); i < tile_n; i += threads)
      cols[i] = n0 + i < extents.n ? column_of<product, kLast>(task, window, n0 + i) : -1;
  }
  __syncthreads();
  constexpr int pairs = tile_n / 2;
  for (int i = static_cast<int>(threadIdx.x); i < tile_m * pairs; i += threads) {
    const int row = i / pairs, col = i % pairs * 2;
    const int64_t m = m0 + row, n = n0 + col;
    if (m >= extents.m || n >= extents.n) continue;
    const auto value = *reinterpret_cast<const Pair<C>*>(tile + row * tile_row + col);
    if (task.splits > 1) {
      *reinterpret_cast<Pair<C>*>(task.partial + (slab * task.m + m) * even_n + n) = value;
      continue;
    }
    const int64_t at = rows[row] + cols[col], second = cols[col + 1] < 0 ? -1 : rows[row] + cols[col + 1];
    if constexpr (!weight && kLast)
      finish(task.target, at, second, group * task.n + n, group * task.n + n + 1, value);
    else
      finish(task.target, at, second, group * task.m + m, group * task.m + m, value);
  }
}

// Adds the parts in order, with the epilogue of conv_kernel. There are blocks for every phase and group, with one
// thread per pair of elements of C, then one per row sum.
template <class S, ConvProduct product, bool kLast>
__global__ void __launch_bounds__(kReduceThreads, 4) conv_reduce_kernel(const __grid_constant__ ConvTask<S> task) {
  using C = Compute<S>;
  constexpr bool weight = product == ConvProduct::weight;
  const int64_t even_n = (task.n + 1) / 2 * 2, pairs = task.m * (even_n / 2);
  const int64_t slabs = int64_t{task.phases} * task.groups;
  const int slab = static_cast<int>(blockIdx.x % slabs), group = slab % task.groups;
  ConvWindow* const window = static_cast<ConvWindow*>(shared_memory());
  open_window(window, task.shape, slab / task.groups);
  const ConvExtents<product, kLast, S> extents(task, *window);
  const int64_t index = blockIdx.x / slabs * kReduceThreads + threadIdx.x;
  if (index >= pairs) {
    const int64_t row = index - pairs;
    if (task.row_sums == nullptr || row >= task.m) return;
    const C* const sums = task.partial + task.splits * slabs * task.m * even_n;
    C sum = 0;
    for (int64_t split = 0; split < task.splits; ++split) sum += sums[(split * slabs + slab) * task.m + row];
    to_storage(sum, task.row_sums + group * task.m + row);
    return;
  }
  const int64_t m = short_quotient(index, even_n / 2), n = (index - m * (even_n / 2)) * 2;
  if (m >= extents.m || n >= extents.n) return;
  Pair<C> value{};
  for (int64_t split = 0; split < task.splits; ++split) {
    const auto part =
        *reinterpret_cast<const Pair<C>*>(task.partial + ((split * slabs + slab) * task.m + m) * even_n + n);
    value.first += part.first;
    value.second += part.second;
  }
  const int64_t row = row_of<product, kLast>(task, *window, group, m);
  const int64_t at = row + column_of<product, kLast>(task, *window, n);
  const int64_t second = n + 1 < extents.n ? row + column_of<product, kLast>(task, *window, n + 1) : -1;
  if constexpr (!weight && kLast)
    finish(task.target, at, second, group * task.n + n, group * task.n + n + 1, value);
  else
    finish(task.target, at, second, group * task.m + m, group * task.m + m, value);
}

// ---- copying filters to the order of the products, with channels innermost

// to[group][n][tap][c], for the n and the channels c of a group. Element (n, tap, c) of the source has these strides.
template <class S>
struct FiltersTask {
  const S* from;
  S* to;
  int64_t count, rows, taps, channels;  // rows: the n per group
  int64_t group_stride, row_stride, tap_stride, channel_stride;
};

constexpr int kFiltersThreads = 256;

template <class S>
__global__ void __launch_bounds__(kFiltersThreads) filters_kernel(const __grid_constant__ FiltersTask<S> task) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kFiltersThreads + threadIdx.x;
  if (index >= task.count) return;
  const int64_t taps = short_quotient(index, task.channels), channel = index - taps * task.channels;
  const int64_t rows = short_quotient(taps, task.taps), tap = taps - rows * task.taps;
  const int64_t group = short_quotient(rows, task.rows), row = rows - group * task.rows;
  task.to[index] = task.from[group * task.group_stride + row * task.row_stride + tap * task.tap_stride +
                             channel * task.channel_stride];
}

}  // namespace
}  // namespace fastops::cuda
