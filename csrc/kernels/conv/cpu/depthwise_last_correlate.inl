// Correlation of rows of a channels_last image with one filter per channel, and its weight gradient. Vectors run along
// the channels, and a block of neighbouring positions shares its loads. Rows are read in place; positions outside the
// image read as zero. E is the element type of the rows: the compute type, or a 16-bit type. A 16-bit element is
// widened at every load, once per row of taps, which is cheaper than writing and reading a widened copy.
#pragma once

#include "../../common/cpu/common.inl"
#include "depthwise_correlate.inl"

// A row of the image that a row of outputs reads, and the weights for it: KW taps, or a single one if every tap has its
// own entry.
template <class E>
struct LastTap {
  const E* row;
  int64_t column;             // of the first tap, relative to position * step
  const Compute<E>* weights;  // of the first vector of channels
};

// The columns that a row of outputs reads: position i reads columns first + i * step + tap.
struct LastRow {
  int64_t first, step, width;  // width: of the rows that are read
  int64_t channels;
  int64_t weight_pitch;  // elements between the weights of successive vectors of channels
};

// A row of outputs: its taps, and its distance from the first output.
template <class E>
struct LastJob {
  const LastTap<E>* taps;
  int count;
  int64_t at;
};

// Positions and vectors of channels per block, and the order of blocks. With AVX-512, a few channels of all rows come
// before the next channels, so that inputs of several rows stay in L1. With 32 bytes of each position at a time, lines
// of memory would come from L2 twice: there all channels of a block come before the next block, and rows are read from
// their beginning to their end (Zen 3: 1.3 to 2.4 times as fast, and level where images come from memory).
#if defined(FASTOPS_VEC_AVX512)
constexpr int kLastVectors = 2;
constexpr bool kLastChannelsInside = false;
#else
constexpr int kLastVectors = 1;
constexpr bool kLastChannelsInside = true;
#endif
constexpr int kLastPositions = 7;

// Loads V vectors of channels, with `count` lanes in the last one; zeros outside the row.
template <bool Inside, bool Whole, int V, class E>
inline void load_channels(const E* row, int64_t column, const LastRow& at, int64_t c, int count,
                          Vec<Compute<E>> (&x)[V]) {
  using Lanes = Vec<Compute<E>>;
  constexpr int S = Lanes::size;
  if (!Inside && (column < 0 || column >= at.width)) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) x[v] = Lanes::zero();
    return;
  }
  const E* const p = row + column * at.channels + c;
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v)
    x[v] = in_register(Whole || v + 1 < V ? Lanes::load(p + v * S) : Lanes::load(p + v * S, count));
}

// acc[i][v] += the sum over the taps, for P positions from `position` on.
template <int KW, int SW, int P, int V, bool Inside, bool Whole, class E>
inline void correlate_last_block(const LastTap<E>* taps, int count, const LastRow& at, int64_t position, int64_t c,
                                 int lanes, Vec<Compute<E>> (&acc)[P][V]) {
  using Lanes = Vec<Compute<E>>;
  constexpr int S = Lanes::size;
  for (int t = 0; t < count; ++t) {
    const E* const row = taps[t].row;
    const Compute<E>* const weights = taps[t].weights + c / S * at.weight_pitch;
    const int64_t column = at.first + position * (KW == 1 ? at.step : SW) + taps[t].column;
    if constexpr (KW == 1) {
      Lanes w[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) w[v] = Lanes::load(weights + v * at.weight_pitch);
#pragma GCC unroll 8
      for (int i = 0; i < P; ++i) {
        Lanes x[V];
        load_channels<Inside, Whole>(row, column + i * at.step, at, c, lanes, x);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) acc[i][v] = fma(x[v], w[v], acc[i][v]);
      }
    } else {
      Lanes w[KW][V];
#pragma GCC unroll 8
      for (int j = 0; j < KW; ++j)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) w[j][v] = Lanes::load(weights + v * at.weight_pitch + j * S);
#pragma GCC unroll 32
      for (int i = 0; i < (P - 1) * SW + KW; ++i) {
        Lanes x[V];
        load_channels<Inside, Whole>(row, column + i, at, c, lanes, x);
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) {
          const int tap = i - p * SW;
          if (tap < 0 || tap >= KW) continue;
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) acc[p][v] = fma(x[v], w[tap][v], acc[p][v]);
        }
      }
    }
  }
}

// The output; successive positions are `position` elements apart.
template <class E>
struct LastOutput {
  PlaneOutput<Compute<E>> out;
  E* y;  // set if results are stored directly or after ReLU; null if `out` has the epilogue
  int64_t position;
  const Compute<E>* bias;  // padded to whole vectors
};

template <int KW, int SW, int P, int V, bool Inside, bool Whole, class E>
inline void correlate_last_tile(const LastJob<E>& job, const LastRow& at, int64_t position, int64_t c, int lanes,
                                const LastOutput<E>& to) {
  using Lanes = Vec<Compute<E>>;
  constexpr int S = Lanes::size;
  Lanes acc[P][V];
#pragma GCC unroll 8
  for (int i = 0; i < P; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) acc[i][v] = Lanes::zero();
  correlate_last_block<KW, SW, P, V, Inside, Whole>(job.taps, job.count, at, position, c, lanes, acc);
#pragma GCC unroll 8
  for (int i = 0; i < P; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      acc[i][v] = acc[i][v] + Lanes::load(to.bias + c + v * S);
      if (to.out.relu) acc[i][v] = rectified(acc[i][v], to.out.relu);
    }
  const int64_t first = job.at + position * to.position + c;
  if (to.y != nullptr) {
#pragma GCC unroll 8
    for (int i = 0; i < P; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        E* const y = to.y + first + i * to.position + v * S;
        if (Whole || v + 1 < V)
          acc[i][v].store(y);
        else
          acc[i][v].store(y, lanes);
      }
    return;
  }
  alignas(64) Compute<E> sums[P * V * S];
#pragma GCC unroll 8
  for (int i = 0; i < P; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) acc[i][v].store(sums + (i * V + v) * S);
  for (int i = 0; i < P; ++i) to.out.finish(to.out, sums + i * V * S, first + i * to.position, (V - 1) * S + lanes);
}

// body(c, V, whole, lanes) for all channels, V vectors at a time.
template <class C, class Body>
inline void for_channels(int64_t channels, Body&& body) {
  constexpr int S = Vec<C>::size, V = kLastVectors;
  int64_t c = 0;
  for (; c + V * S <= channels; c += V * S) body(c, Number<V>{}, Number<1>{}, S);
  for (; c < channels; c += S) body(c, Number<1>{}, Number<0>{}, static_cast<int>(smaller<int64_t>(S, channels - c)));
}

// Whether P positions from `position` on read only inside the row.
template <int KW, int SW, int P, class E>
inline bool reads_inside(const LastTap<E>* taps, int count, const LastRow& at, int64_t position) {
  const int64_t step = KW == 1 ? at.step : SW;
  bool inside = true;
  for (int t = 0; t < count; ++t) {
    const int64_t low = at.first + position * step + taps[t].column, high = low + (P - 1) * step + KW - 1;
    inside = inside && low >= 0 && high < at.width;
  }
  return inside;
}

// Rows of `positions` outputs, a block of positions at a time.
template <int KW, int SW, class E>
void correlate_last(const LastJob<E>* jobs, int64_t rows, const LastRow& at, int64_t positions,
                    const LastOutput<E>& to) {
  constexpr int P = kLastPositions;
  const auto tile = [&](const LastJob<E>& job, int64_t p, auto size, auto inside, int64_t c, auto vectors, auto whole,
                        int lanes) {
    correlate_last_tile<KW, SW, decltype(size)::value, decltype(vectors)::value, decltype(inside)::value == 1,
                        decltype(whole)::value == 1>(job, at, p, c, lanes, to);
  };
  const auto for_blocks = [&](const LastJob<E>& job, auto&& body) {
    for (int64_t i = 0; i < positions && positions < P; ++i) body(i, Number<1>{}, Number<0>{});
    for (int64_t i = 0; i < positions && positions >= P; i += P) {
      const int64_t p = smaller(i, positions - P);  // the last block computes some positions a second time
      if (reads_inside<KW, SW, P>(job.taps, job.count, at, p))
        body(p, Number<P>{}, Number<1>{});
      else
        body(p, Number<P>{}, Number<0>{});
    }
  };
  if constexpr (kLastChannelsInside) {
    for (int64_t r = 0; r < rows; ++r)
      for_blocks(jobs[r], [&](int64_t p, auto size, auto inside) {
        for_channels<Compute<E>>(at.channels, [&](int64_t c, auto vectors, auto whole, int lanes) {
          tile(jobs[r], p, size, inside, c, vectors, whole, lanes);
        });
      });
  } else {
    for_channels<Compute<E>>(at.channels, [&](int64_t c, auto vectors, auto whole, int lanes) {
      for (int64_t r = 0; r < rows; ++r)
        for_blocks(jobs[r], [&](int64_t p, auto size, auto inside) {
          tile(jobs[r], p, size, inside, c, vectors, whole, lanes);
        });
    });
  }
}

// The weight gradient: sums[tap] += x g over rows of positions. The sums are in the place of the taps' weights.
// grad[at] is the first gradient of a job.
template <int KW, int SW, class E>
void weight_sums_last(const LastJob<E>* jobs, int64_t rows, const Compute<E>* grads, const LastRow& at,
                      int64_t positions) {
  using C = Compute<E>;
  using Lanes = Vec<C>;
  constexpr int S = Lanes::size;
  const int64_t step = KW == 1 ? at.step : SW;
  LastRow grad_row = at;
  grad_row.width = positions;
  const auto add = [&](const LastTap<E>& tap, const C* grad, int64_t c, auto vectors, auto whole, int lanes) {
    constexpr int V = decltype(vectors)::value;
    constexpr bool kWhole = decltype(whole)::value == 1;
    C* const to = const_cast<C*>(tap.weights) + c / S * at.weight_pitch;
    Lanes acc[KW][V];
#pragma GCC unroll 8
    for (int j = 0; j < KW; ++j)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[j][v] = Lanes::load(to + v * at.weight_pitch + j * S);
    const auto block = [&](int64_t position, auto size, auto inside) {
      constexpr int P = decltype(size)::value;
      constexpr bool kInside = decltype(inside)::value == 1;
      const int64_t column = at.first + position * step + tap.column;
      Lanes g[P][V];
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) load_channels<true, kWhole>(grad, position + p, grad_row, c, lanes, g[p]);
#pragma GCC unroll 32
      for (int i = 0; i < (KW == 1 ? P : (P - 1) * SW + KW); ++i) {
        Lanes x[V];
        load_channels<kInside, kWhole>(tap.row, column + i * (KW == 1 ? step : 1), at, c, lanes, x);
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) {
          const int j = KW == 1 ? i - p : i - p * SW;
          if (j < 0 || j >= KW) continue;
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) acc[j][v] = fma(x[v], g[p][v], acc[j][v]);
        }
      }
    };
    int64_t p = 0;
    for (; p + kLastPositions <= positions; p += kLastPositions) {
      if (reads_inside<KW, SW, kLastPositions>(&tap, 1, at, p))
        block(p, Number<kLastPositions>{}, Number<1>{});
      else
        block(p, Number<kLastPositions>{}, Number<0>{});
    }
    for (; p < positions; ++p) block(p, Number<1>{}, Number<0>{});
#pragma GCC unroll 8
    for (int j = 0; j < KW; ++j)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[j][v].store(to + v * at.weight_pitch + j * S);
  };
  for_channels<C>(at.channels, [&](int64_t c, auto vectors, auto whole, int lanes) {
    for (int64_t r = 0; r < rows; ++r)
      for (int t = 0; t < jobs[r].count; ++t) add(jobs[r].taps[t], grads + jobs[r].at, c, vectors, whole, lanes);
  });
}
