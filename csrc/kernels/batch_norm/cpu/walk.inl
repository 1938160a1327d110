// What both passes share: how channels are divided among threads, and what they know of a channel.
//
// Planes (inner > 1): all of a channel's planes are one run of elements. With enough channels a thread does a channel
// from its statistics to its results, while its elements are in L2. With few, a channel has several parts, whose sums
// are added in order.
// Rows (inner == 1): a chunk is a run of rows, of which each has its sums of every channel. The chunks' sums are added
// in order.
//
// Parts and chunks depend on the shape alone, so the result is bitwise the same for any number of threads.
#pragma once

#include "../../activation/cpu/rows.inl"
#include "../../common/cpu/common.inl"
#include "../batch_norm.h"

constexpr int64_t kPlaneBlock = 2048;  // elements of a plane, or
constexpr int64_t kBlockRows = 64;     // rows, whose sums are formed in the compute type before they go into float64
constexpr int64_t kPiece =
    256;                      // elements that are computed in a buffer, for activations without a kernel of their own
constexpr int kRowGroup = 4;  // rows that are read together, so that a channel's numbers are loaded once for all

// Rows that are written together, and whether rows that are read together are fetched ahead, in the order of memory:
// Zen 1's prefetchers do not follow four ways through one page. Channels_last, 2 threads, us, medians of four
// processes: four rows and no fetching; rows written one after the other; and the next ones fetched as well.
// 8x144x56x56 forward 4210, 3460 and 2830, with backward 10720, 9070 and 7440; bfloat16 3080, 2290 and 2080, 8320, 6750
// and 5220. 8x64x14x14, which stays in L2, forward 41, 48 and 47.
#if defined(FASTOPS_VEC_AVX2)
constexpr int kWritten = 1;
constexpr bool kFetched = true;
#else
constexpr int kWritten = kRowGroup;
constexpr bool kFetched = false;
#endif

constexpr int64_t kGrain = 16384;  // the least number of elements per thread: waking one takes some microseconds

struct Walk {
  int64_t outer, channels, inner;
  int64_t parts;   // of a channel; of all rows, if inner == 1
  int64_t padded;  // channels, rounded up to whole cache lines

  bool rows() const { return inner == 1; }
  int64_t size() const { return outer * inner; }                       // elements of a channel
  int64_t begin(int64_t part) const { return size() * part / parts; }  // of a part, in elements or rows
  int64_t elements() const { return size() * channels; }
};

inline Walk walk_of(int64_t outer, int64_t channels, int64_t inner) {
  Walk walk = {outer, channels, inner, 1, round_up(channels, 16)};
  // Enough for 32 threads; sums of at least 32768 elements, whose cost is then small beside theirs.
  const int64_t wanted = walk.rows() ? 32 : ceil_div(32, channels);
  const int64_t most = (walk.rows() ? walk.elements() : walk.size()) / 32768;
  walk.parts = larger<int64_t>(1, smaller(wanted, most));
  return walk;
}

// body(unit, thread) for every unit. A thread of a team of this size always gets the same run of units, in order or
// from the last to the first: what was read last is then in its caches still.
template <bool in_order = true, class Body>
void for_norm_units(const Team& team, int64_t elements, int64_t units, Body body) {
  parallel(team, threads_for(team, elements, units, kGrain),
           [&](Crew& crew) { crew.each<in_order>(units, [&](int64_t unit) { body(unit, crew.thread); }); });
}

// body(plane, first, count, planes) for the elements [begin, end) of a channel's planes: `count` elements from `first`
// on of each of `planes` planes, which are whole where there are several.
template <class Body>
inline void for_planes(int64_t inner, int64_t begin, int64_t end, Body body) {
  int64_t plane = begin / inner, first = begin % inner;
  while (begin < end) {
    const int64_t whole = first == 0 ? (end - begin) / inner : 0;
    const int64_t planes = larger<int64_t>(1, whole), count = smaller(inner - first, end - begin);
    body(plane, first, count, planes);
    begin += planes * count;
    plane += planes;
    first = 0;
  }
}

// body(group, size) for rows [begin, end), `together` at a time and then one by one; `size` is a constant.
template <int n>
struct Fixed {
  static constexpr int value = n;
};
template <int together, class Body>
inline void for_rows(int64_t begin, int64_t end, Body body) {
  for (; begin + together <= end; begin += together) body(begin, Fixed<together>{});
  for (; begin < end; ++begin) body(begin, Fixed<1>{});
}

// For vector i / Vec<C>::size of a group of `size` rows of n elements: fetches its share of the group behind it.
template <int size, class C, class T>
inline void fetch_next([[maybe_unused]] const T* rows, [[maybe_unused]] int64_t n, [[maybe_unused]] int64_t i) {
  if constexpr (kFetched && size > 1) {
    constexpr int64_t line = 64 / sizeof(T);
    const T* const next = rows + size * (n + i);
    for (int64_t at = 0; at < size * Vec<C>::size; at += line) __builtin_prefetch(next + at);
  }
}

// z = (x - mean) scale + beta. Of all channels: arrays with space for whole vectors.
template <class C>
struct Numbers {
  C *mean, *scale, *beta;
  C *slope, *offset;  // of backward: grad_x = scale g - slope (x - mean) - offset
};
template <class C>
struct Channel {
  Vec<C> mean, scale, beta, slope, offset;
};
template <class C>
inline Channel<C> channel_of(const Numbers<C>& numbers, int64_t c) {
  using V = Vec<C>;
  return {V::set1(numbers.mean[c]), V::set1(numbers.scale[c]), V::set1(numbers.beta[c]), V::set1(numbers.slope[c]),
          V::set1(numbers.offset[c])};
}
template <class C>
inline Channel<C> channels_of(const Numbers<C>& numbers, int64_t c) {
  using V = Vec<C>;
  return {V::load(numbers.mean + c), V::load(numbers.scale + c), V::load(numbers.beta + c), V::load(numbers.slope + c),
          V::load(numbers.offset + c)};
}
template <class C>
inline Numbers<C> from_channel(const Numbers<C>& n, int64_t c) {
  return {n.mean + c, n.scale + c, n.beta + c, n.slope + c, n.offset + c};
}

// Parameters as numbers: gamma, beta, running statistics.
template <class S>
struct Parameter {
  const void* data;  // null: `missing` for each channel
  bool single;       // float32
  Compute<S> missing;

  Compute<S> operator[](int64_t c) const {
    if (data == nullptr) return missing;
    if (single) return static_cast<const float*>(data)[c];
    return load_one(static_cast<const S*>(data) + c);
  }
};
template <class S>
inline void store_parameter(void* data, bool single, int64_t c, double value) {
  if (single)
    static_cast<float*>(data)[c] = static_cast<float>(value);
  else
    Vec<Compute<S>>::set1(static_cast<Compute<S>>(value)).store(static_cast<S*>(data) + c, 1);
}

// The workspace: two sums of each channel and part, the numbers of all channels, and a thread's sums of a block.
template <class C>
struct Workspace {
  double *first, *second;  // [parts][padded]
  Numbers<C> numbers;
  C* sums;  // [threads][kThreadArrays][padded], only of rows

  static constexpr int64_t kThreadArrays = 3;
  static size_t bytes(const Walk& walk, int threads) {
    const int64_t arrays = 5 + (walk.rows() ? kThreadArrays * threads : 0);
    return aligned((2 * walk.parts * static_cast<int64_t>(sizeof(double)) + arrays * static_cast<int64_t>(sizeof(C))) *
                   walk.padded);
  }
  Workspace(const Walk& walk, void* memory) {
    first = static_cast<double*>(memory);
    second = first + walk.parts * walk.padded;
    C* next = reinterpret_cast<C*>(second + walk.parts * walk.padded);
    const auto array = [&] {
      C* const one = next;
      next += walk.padded;
      return one;
    };
    numbers.mean = array();
    numbers.scale = array();
    numbers.beta = array();
    numbers.slope = array();
    numbers.offset = array();
    sums = next;
  }
};

// body(Kind{}, Derivative{}) for the kinds with kernels of their own, else for the identity.
template <class Body>
inline auto with_direct_kind(ActivationKind kind, Body&& body) {
  switch (kind) {
    case ActivationKind::relu:
      return body(Relu{}, Piecewise<Relu>{});
    case ActivationKind::relu6:
    case ActivationKind::hardtanh:
      return body(Hardtanh{}, Piecewise<Hardtanh>{});
    default:
      return body(Identity{}, Identity{});
  }
}
inline bool is_direct(ActivationKind kind) {
  return kind == ActivationKind::identity || kind == ActivationKind::relu || kind == ActivationKind::relu6 ||
         kind == ActivationKind::hardtanh;
}
