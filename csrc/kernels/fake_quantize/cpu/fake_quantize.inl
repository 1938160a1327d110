// Fake quantization, each pass in one pass over memory. The contract is csrc/kernels/fake_quantize/fake_quantize.h.
//
// Rows are cut into blocks of columns, which are the units of the work. Sums over a channel are partial sums of its
// units, added in order.
#pragma once

#include "../../common/cpu/common.inl"
#include "../fake_quantize.h"

constexpr int64_t kFakeBlock = 8192;   // columns of a unit; of rows that share no scale, rows of a unit are
constexpr int64_t kFakeRows = 64;      // this many
constexpr int64_t kFakeGrain = 32768;  // elements a thread, as loops that are bound by memory have
constexpr int64_t kFakeSummed = 512;   // elements that are summed in lanes before the sum is widened

// ---- what rounds to which level

// Scales, their inverses and zero points in the type that is computed in, padded to whole vectors.
template <class C>
struct FakeGrids {
  C *scale, *inverse, *zero;
};
inline int64_t padded_channels(int64_t channels) { return round_up(channels, 16); }

template <class C>
inline size_t grids_bytes(int64_t channels) {
  return aligned(3 * padded_channels(channels) * static_cast<int64_t>(sizeof(C)));
}

template <class C>
inline FakeGrids<C> make_grids(const float* scale, const float* zero, int64_t channels, void* workspace) {
  const int64_t padded = padded_channels(channels);
  C* const at = static_cast<C*>(workspace);
  const FakeGrids<C> grids{at, at + padded, at + 2 * padded};
  for (int64_t c = 0; c < padded; ++c) {
    const float s = c < channels ? scale[c] : 1.0f;
    grids.scale[c] = s;
    grids.inverse[c] = 1.0f / s;
    grids.zero[c] = c < channels ? zero[c] : 0.0f;
  }
  return grids;
}

template <class C>
struct FakeGrid {
  Vec<C> scale, inverse, zero;
};
template <class C>
inline FakeGrid<C> grid_of(const FakeGrids<C>& grids, int64_t channel) {
  return {Vec<C>::set1(grids.scale[channel]), Vec<C>::set1(grids.inverse[channel]), Vec<C>::set1(grids.zero[channel])};
}
template <class C>
inline FakeGrid<C> grids_from(const FakeGrids<C>& grids, int64_t channel) {
  return {Vec<C>::load(grids.scale + channel), Vec<C>::load(grids.inverse + channel),
          Vec<C>::load(grids.zero + channel)};
}

// r of the contract.
template <bool whole, class C>
inline Vec<C> unclamped_level(Vec<C> x, Vec<C> inverse, Vec<C> zero) {
  if constexpr (whole)
    return round(x * inverse) + zero;
  else
    return round(x * inverse + zero);
}

// ---- masks of a byte an element

// Bits 0 to 7 as bytes, each 0 or 1, and back.
inline uint64_t bytes_of_bits(unsigned bits) {
  const uint64_t one = uint64_t{bits & 0xff} * 0x0101010101010101 & 0x8040201008040201;
  return (one + 0x7f7f7f7f7f7f7f7f) >> 7 & 0x0101010101010101;
}
inline unsigned bits_of_bytes(uint64_t bytes) { return static_cast<unsigned>(bytes * 0x0102040810204080 >> 56); }

inline void store_mask(uint8_t* mask, unsigned bits, int count) {
  for (int i = 0; i < count; i += 8, bits >>= 8) {
    const uint64_t bytes = bytes_of_bits(bits);
    if (i + 8 <= count)
      __builtin_memcpy(mask + i, &bytes, 8);
    else
      __builtin_memcpy(mask + i, &bytes, static_cast<size_t>(count - i));
  }
}
inline unsigned load_mask(const uint8_t* mask, int count) {
  unsigned bits = 0;
  for (int i = 0; i < count; i += 8) {
    uint64_t bytes = 0;
    if (i + 8 <= count)
      __builtin_memcpy(&bytes, mask + i, 8);
    else
      __builtin_memcpy(&bytes, mask + i, static_cast<size_t>(count - i));
    bits |= bits_of_bytes(bytes) << i;
  }
  return bits;
}

// step(i, j, count) for the vectors of n elements: element i + j is the first of `count`. finish(i, count) follows
// those of a mask's whole bytes.
template <class C, class Step, class Finish>
inline void for_mask_steps(int64_t n, Step step, Finish finish) {
  constexpr int size = Vec<C>::size, together = size > 8 ? size : 8;
  int64_t i = 0;
  for (; i + together <= n; i += together) {
    for (int j = 0; j < together; j += size) step(i, j, size);
    finish(i, together);
  }
  const int tail = static_cast<int>(n - i);
  if (tail == 0) return;
  for (int j = 0; j < tail; j += size) step(i, j, smaller<int>(size, tail - j));
  finish(i, tail);
}

template <class C, class S>
inline Vec<C> load_step(const S* p, int count) {
  return count == Vec<C>::size ? Vec<C>::load(p) : Vec<C>::load(p, count);
}
template <class C, class S>
inline void store_step(Vec<C> v, S* p, int count) {
  if (count == Vec<C>::size)
    v.store(p);
  else
    v.store(p, count);
}

// ---- units

// Units of rows x cols, each a part of one row.
struct FakeUnits {
  int64_t cols, blocks;
  explicit FakeUnits(int64_t cols) : cols(cols), blocks(ceil_div(cols, kFakeBlock)) {}
  int64_t row(int64_t unit) const { return unit / blocks; }
  int64_t first(int64_t unit) const { return unit % blocks * kFakeBlock; }
  int64_t count(int64_t unit) const { return smaller(kFakeBlock, cols - first(unit)); }
};

// ---- forward

// Elements of one scale, number `channel`, or by_column of as many from there on.
template <bool by_column, bool whole, bool with_mask, class S>
inline void fake_quantize_row(const S* x, S* y, uint8_t* mask, int64_t n, int low_level, int high_level,
                              const FakeGrids<Compute<S>>& grids, int64_t channel) {
  using C = Compute<S>;
  using V = Vec<C>;
  const V low = set<C>(low_level), high = set<C>(high_level);
  const V one_scale = V::set1(grids.scale[channel]), one_inverse = V::set1(grids.inverse[channel]),
          one_zero = V::set1(grids.zero[channel]);
  const C *const scales = grids.scale + channel, *const inverses = grids.inverse + channel,
                 *const zeros = grids.zero + channel;
  unsigned bits = 0;
  for_mask_steps<C>(
      n,
      [&](int64_t i, int j, int count) __attribute__((always_inline)) {
        const V scale = by_column ? V::load(scales + i + j) : one_scale;
        const V inverse = by_column ? V::load(inverses + i + j) : one_inverse;
        const V zero = by_column ? V::load(zeros + i + j) : one_zero;
        const V r = unclamped_level<whole>(load_step<C>(x + i + j, count), inverse, zero);
        if constexpr (with_mask) bits |= (ge(r, low) & le(r, high)).bits() << j;
        store_step((min(max(r, low), high) - zero) * scale, y + i + j, count);
      },
      [&](int64_t i, int count) __attribute__((always_inline)) {
        if constexpr (with_mask) store_mask(mask + i, bits, count);
        bits = 0;
      });
}

template <class S, bool whole, bool with_mask>
void fake_quantize_forward(const Bound<FakeQuantizeForward>& args, void* workspace, const Team& team) {
  using C = Compute<S>;
  const FakeGrids<C> grids = make_grids<C>(args.scale, args.zero, args.channels, workspace);
  const S* const x = static_cast<const S*>(args.x);
  S* const y = static_cast<S*>(args.y);
  const FakeUnits units(args.inner);
  const int64_t count = args.outer * units.blocks;
  parallel(team, threads_for(team, args.outer * args.inner, count, kFakeGrain), [&](Crew& crew) {
    crew.each(count, [&](int64_t unit) {
      const int64_t row = units.row(unit), first = units.first(unit), at = row * args.inner + first;
      const auto run =
          args.by_column ? fake_quantize_row<true, whole, with_mask, S> : fake_quantize_row<false, whole, with_mask, S>;
      run(x + at, y + at, args.mask + (with_mask ? at : 0), units.count(unit), args.low, args.high, grids,
          args.by_column ? first : row % args.channels);
    });
  });
}

// ---- backward

template <class S>
void fake_quantize_backward(const Bound<FakeQuantizeBackward>& args, const Team& team) {
  using C = Compute<S>;
  const S* const grad_y = static_cast<const S*>(args.grad_y);
  S* const grad_x = static_cast<S*>(args.grad_x);
  const FakeUnits units(args.outer * args.inner);
  parallel(team, threads_for(team, units.cols, units.blocks, kFakeGrain), [&](Crew& crew) {
    crew.each(units.blocks, [&](int64_t unit) {
      const int64_t at = units.first(unit);
      for_mask_steps<C>(
          units.count(unit),
          [&](int64_t i, int j, int count) __attribute__((always_inline)) {
            const Mask<C> inside = Mask<C>::from_bits(load_mask(args.mask + at + i + j, count));
            store_step(select(inside, load_step<C>(grad_y + at + i + j, count), Vec<C>::zero()), grad_x + at + i + j,
                       count);
          },
          [](int64_t, int) {});
    });
  });
}

// ---- backward of learned scales and zero points

template <class C>
struct FakeSums {
  Vec<C> scale = Vec<C>::zero(), zero = Vec<C>::zero();
};

// Of one vector of elements. Lanes beyond `count` add 0.
template <bool whole, class S, class C>
inline void learn(const S* grad_y, const S* x, S* grad_x, int count, const FakeGrid<C>& grid, Vec<C> low, Vec<C> high,
                  FakeSums<C>& sums) {
  using V = Vec<C>;
  const V g = load_step<C>(grad_y, count), v = load_step<C>(x, count);
  const V r = unclamped_level<whole>(v, grid.inverse, grid.zero), steps = min(max(r, low), high) - grid.zero;
  const Mask<C> inside = ge(r, low) & le(r, high);
  if (grad_x != nullptr) store_step(select(inside, g, V::zero()), grad_x, count);
  sums.scale = sums.scale + g * select(inside, (steps * grid.scale - v) * grid.inverse, steps);
  sums.zero = sums.zero - select(inside, V::zero(), g * grid.scale);
}

template <class S, bool whole>
void learned_by_row(const Bound<FakeQuantizeLearnedBackward>& args, const FakeGrids<Compute<S>>& grids, double* parts,
                    const Team& team) {
  using C = Compute<S>;
  constexpr int size = Vec<C>::size;
  const S *const grad_y = static_cast<const S*>(args.grad_y), *const x = static_cast<const S*>(args.x);
  S* const grad_x = static_cast<S*>(args.grad_x);
  const Vec<C> low = set<C>(args.low), high = set<C>(args.high);
  const FakeUnits units(args.inner);
  const int64_t count = args.outer * units.blocks;
  parallel(team, threads_for(team, args.outer * args.inner, count, kFakeGrain), [&](Crew& crew) {
    const bool on = crew.each(count, [&](int64_t unit) {
      const int64_t row = units.row(unit), at = row * args.inner + units.first(unit), n = units.count(unit);
      const FakeGrid<C> grid = grid_of(grids, row % args.channels);
      double of_scale = 0, of_zero = 0;
      for (int64_t from = 0; from < n; from += kFakeSummed) {
        const int64_t to = smaller(from + kFakeSummed, n);
        FakeSums<C> sums;
        for (int64_t i = at + from; i < at + to; i += size)
          learn<whole>(grad_y + i, x + i, grad_x == nullptr ? nullptr : grad_x + i,
                       static_cast<int>(smaller<int64_t>(size, at + to - i)), grid, low, high, sums);
        of_scale += reduce_add(sums.scale);
        of_zero += reduce_add(sums.zero);
      }
      parts[2 * unit] = of_scale;
      parts[2 * unit + 1] = of_zero;
    });
    if (!on) return;
    crew.each(args.channels, [&](int64_t channel) {
      double of_scale = 0, of_zero = 0;
      for (int64_t row = channel; row < args.outer; row += args.channels)
        for (int64_t unit = row * units.blocks; unit < (row + 1) * units.blocks; ++unit) {
          of_scale += parts[2 * unit];
          of_zero += parts[2 * unit + 1];
        }
      args.grad_scale[channel] = static_cast<float>(of_scale);
      args.grad_zero[channel] = static_cast<float>(of_zero);
    });
  });
}

template <class S, bool whole>
void learned_by_column(const Bound<FakeQuantizeLearnedBackward>& args, const FakeGrids<Compute<S>>& grids,
                       double* parts, const Team& team) {
  using C = Compute<S>;
  constexpr int size = Vec<C>::size;
  const S *const grad_y = static_cast<const S*>(args.grad_y), *const x = static_cast<const S*>(args.x);
  S* const grad_x = static_cast<S*>(args.grad_x);
  const Vec<C> low = set<C>(args.low), high = set<C>(args.high);
  const int64_t count = ceil_div(args.outer, kFakeRows), cols = args.inner;
  parallel(team, threads_for(team, args.outer * cols, count, kFakeGrain), [&](Crew& crew) {
    const bool on = crew.each(count, [&](int64_t unit) {
      const int64_t last = smaller((unit + 1) * kFakeRows, args.outer);
      for (int64_t c = 0; c < cols; c += size) {
        const int lanes = static_cast<int>(smaller<int64_t>(size, cols - c));
        const FakeGrid<C> grid = grids_from(grids, c);
        FakeSums<C> sums;
        for (int64_t row = unit * kFakeRows; row < last; ++row) {
          const int64_t i = row * cols + c;
          learn<whole>(grad_y + i, x + i, grad_x == nullptr ? nullptr : grad_x + i, lanes, grid, low, high, sums);
        }
        C of_scale[size], of_zero[size];
        sums.scale.store(of_scale);
        sums.zero.store(of_zero);
        for (int l = 0; l < lanes; ++l) {
          parts[2 * (unit * cols + c + l)] = of_scale[l];
          parts[2 * (unit * cols + c + l) + 1] = of_zero[l];
        }
      }
    });
    if (!on) return;
    crew.each(cols, [&](int64_t c) {
      double of_scale = 0, of_zero = 0;
      for (int64_t unit = 0; unit < count; ++unit) {
        of_scale += parts[2 * (unit * cols + c)];
        of_zero += parts[2 * (unit * cols + c) + 1];
      }
      args.grad_scale[c] = static_cast<float>(of_scale);
      args.grad_zero[c] = static_cast<float>(of_zero);
    });
  });
}

// ---- plans

inline const char* fake_quantize_name(bool by_column, int64_t channels) {
  return by_column ? "by_column" : channels > 1 ? "by_row" : "one_scale";
}

template <class S, bool whole, bool with_mask>
void plan_fake_quantize(Plan<FakeQuantizeForward>& plan) {
  decide(plan, {fake_quantize_name(plan.call.by_column, plan.call.channels)},
         grids_bytes<Compute<S>>(plan.call.channels), [](auto& args, auto* workspace, auto& team) {
           fake_quantize_forward<S, whole, with_mask>(args, workspace, team);
         });
}

void plan_call(Plan<FakeQuantizeForward>& plan) {
  if (plan.call.outer * plan.call.inner == 0) return decide_nothing(plan);
  with_dtype(plan.call.dtype, [&](auto type) {
    using S = decltype(type);
    const auto plans =
        plan.call.whole_zero
            ? (plan.call.with_mask ? plan_fake_quantize<S, true, true> : plan_fake_quantize<S, true, false>)
            : (plan.call.with_mask ? plan_fake_quantize<S, false, true> : plan_fake_quantize<S, false, false>);
    plans(plan);
  });
}

void plan_call(Plan<FakeQuantizeBackward>& plan) {
  if (plan.call.outer * plan.call.inner == 0) return decide_nothing(plan);
  with_dtype(plan.call.dtype, [&](auto type) {
    decide(plan, {"from_mask"}, 0,
           [](auto& args, auto*, auto& team) { fake_quantize_backward<decltype(type)>(args, team); });
  });
}

template <class S, bool whole>
void plan_learned(Plan<FakeQuantizeLearnedBackward>& plan) {
  const FakeQuantizeLearnedBackward& call = plan.call;
  const int64_t parts =
      call.by_column ? ceil_div(call.outer, kFakeRows) * call.inner : call.outer * FakeUnits(call.inner).blocks;
  decide(plan, {fake_quantize_name(call.by_column, call.channels)},
         grids_bytes<Compute<S>>(call.channels) + aligned(16 * parts), [](auto& args, auto* workspace, auto& team) {
           using C = Compute<S>;
           const FakeGrids<C> grids = make_grids<C>(args.scale, args.zero, args.channels, workspace);
           double* const sums =
               reinterpret_cast<double*>(static_cast<unsigned char*>(workspace) + grids_bytes<C>(args.channels));
           (args.by_column ? learned_by_column<S, whole> : learned_by_row<S, whole>)(args, grids, sums, team);
         });
}

// Without rows there still are sums, which are 0.
void plan_call(Plan<FakeQuantizeLearnedBackward>& plan) {
  if (plan.call.channels == 0) return decide_nothing(plan);
  with_dtype(plan.call.dtype, [&](auto type) {
    using S = decltype(type);
    plan.call.whole_zero ? plan_learned<S, true>(plan) : plan_learned<S, false>(plan);
  });
}
