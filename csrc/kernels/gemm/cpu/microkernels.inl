// The microkernels of the matrix product. They keep mr x nr elements of C in registers over one block of k (Goto & van
// de Geijn, "Anatomy of high-performance matrix multiplication", 2008; Van Zee & van de Geijn, "BLIS", 2015).
//
//   C[i, j] = sum_p A[i, p] B[p, j]      i < rows <= mr, j < cols <= nr, p < k
//
// Element (i, p) of A is at a + i * a_rs + p * a_ks. A packed panel has a_rs = 1 and a_ks = mr; an operand that is read
// in place has its own strides. Row p of B is contiguous and starts at b + p * b_ks; a packed panel has b_ks = nr.
#pragma once

#include "../../activation/cpu/rows.inl"
#include "../../common/cpu/common.inl"

// The element types of panels: float, double, and bf16_pair, which holds two neighbours along k.
struct bf16_pair {
  uint32_t bits;
};

template <class P>
struct Panel;

// a b + c, added where c is. The compiler's choice among the three forms of the instruction moves accumulators from
// register to register and, in a loop of several steps, some to memory: 2% of a product (AVX2, Zen 3).
template <class T>
inline Vec<T> accumulate(Vec<T> a, Vec<T> b, Vec<T> c) {
#if defined(FASTOPS_VEC_AVX2)
  if constexpr (sizeof(T) == sizeof(float))
    asm("vfmadd231ps %2, %1, %0" : "+x"(c.v) : "x"(a.v), "x"(b.v));
  else
    asm("vfmadd231pd %2, %1, %0" : "+x"(c.v) : "x"(a.v), "x"(b.v));
  return c;
#else
  return fma(a, b, c);
#endif
}

template <class T>
struct FullPanel {
  using Compute = T;
  using Row = Vec<T>;
  static Row load(const T* b) { return Row::load(b); }
  static Row load(const T* b, int count) { return Row::load(b, count); }
  static Vec<T> multiply_add(const T* a, Row b, Vec<T> c) { return accumulate(Vec<T>::set1(*a), b, c); }
};
#if defined(FASTOPS_VEC_NEON)
template <>
struct Panel<float> : FullPanel<float> {
  // A multiply-add takes a lane of a vector: so nothing is spread to all lanes.
  static VecF multiply_add(const float* a, VecF b, VecF c) { return {vfmaq_lane_f32(c.v, b.v, float32x2_t{*a}, 0)}; }
};
#else
template <>
struct Panel<float> : FullPanel<float> {};
#endif
template <>
struct Panel<double> : FullPanel<double> {};

#if defined(FASTOPS_HAS_AVX512_BF16)
template <>
struct Panel<bf16_pair> {
  using Compute = float;
  struct Row {
    __m512i v;
  };
  static Row load(const bf16_pair* b) { return {_mm512_loadu_si512(b)}; }
  static Row load(const bf16_pair* b, int count) { return {_mm512_maskz_loadu_epi32(first16(count), b)}; }
  static Vec<float> multiply_add(const bf16_pair* a, Row b, Vec<float> c) {
    const __m512i pair = _mm512_set1_epi32(static_cast<int>(a->bits));
    return {_mm512_dpbf16_ps(c.v, (__m512bh)pair, (__m512bh)b.v)};
  }
};
#endif

// Register tiles. Of 32 vector registers, 24 are accumulators and 2 hold a row of B; the broadcast of A is an operand
// of the multiply-add. Of 12x32, 14x32, 8x48 and 6x64 in float32, only 12x32 keeps 95% of the multiply-add peak at k =
// 784 (Zen 5). Of 16 vector registers, 12 are accumulators.
#if defined(FASTOPS_32_REGISTERS)
constexpr int kMr = 12;
#else
constexpr int kMr = 6;
#endif
constexpr int kNrVectors = 2;
template <class C>
constexpr int kNr = kNrVectors * Vec<C>::size;

// Steps of k that tiles of whole vectors take at once; whether a tile has its rows of C fetched before it begins.
// Measured on Zen 3, whose other thread of the core somebody else had, one thread, linear layers of 128x784x128, 512^3,
// 1024^3, 197x768x3072 and 1024x3072x768, forward and either gradient: four steps at once 1.11 to 1.14 times as fast as
// one, C fetched another 1.05 to 1.13 times (geometric means; level where C is in the caches). When the core was ours
// alone, level to 1.05 times, and 0.9 to 1.0 for a k of 64. Fetching C gained nothing on Granite Rapids.
#if defined(FASTOPS_VEC_AVX2)
constexpr int kSteps = 4;
constexpr bool kFetchesC = true;
#else
constexpr int kSteps = 1;
constexpr bool kFetchesC = false;
#endif

// The output of a tile: c = acc + prev + bias + row_bias, then ReLU or ReLU6 if wanted. A null addend is left out. prev
// may be c.
template <class C>
struct TileOut {
  C* c;
  int64_t c_rs;
  const C* prev;
  int64_t prev_rs;
  const C* bias;
  Rectifier relu;
  bool stream;        // non-temporal stores: every row of c is aligned to vectors, and c is not read again
  const C* row_bias;  // one value per row
  const C* add;       // null, or added to complete sums
  int64_t add_rs;
  const void* ahead;  // null, or what is read soon: a cache line of it is prefetched for every kSteps of k
};

// Block sizes. Measured on Granite Rapids (48 KB L1d, 2 MB L2) unless stated otherwise.
struct GemmBlocking {
  int64_t kc;                // the longest k block, in elements of T
  int64_t ks;                // the part of k that is packed at a time
  int64_t shared_bytes;      // the largest packed block of the shared operand
  int64_t partial_elements;  // the largest block of partial sums, for 16-bit outputs
  int64_t strip_rows;        // the longest private strip, in rows of A
  int64_t strip;             // the longest private strip, in columns of B; also the columns of a block of C
  int64_t mc;                // the rows of a block of C: `strip` columns are computed before the next mc rows
};

// The state of a thread while it multiplies; vector registers need none.
struct NoSession {
  NoSession() {}
};

// The properties of a kind of product:
//   A, B            the element types of packed panels
//   mr, nr          the register tile
//   step            steps of k in one panel element
//   k_align         k is padded with zeros to a multiple of this
//   readable        the microkernel can read an unpacked A or B of that type in place
//   tiles_in_place  the microkernel can read whole tiles of an unpacked A in place
template <class P>
struct Tile {
  using A = P;
  using B = P;
  using C = typename Panel<P>::Compute;
  using Session = NoSession;
  static constexpr int mr = kMr, nr = kNr<C>;
  static constexpr int step = 1;
  static constexpr int k_align = 1;
  static constexpr bool readable = true, tiles_in_place = false;
#if defined(FASTOPS_VEC_AVX512)
  static constexpr GemmBlocking blocking = {512, 4096, 8 << 20, 4 << 20, 20 * kMr, 1024 / sizeof(C), 2 * kMr};
#elif defined(FASTOPS_VEC_NEON)
  // As many rows and columns as AVX2's. Not measured.
  static constexpr GemmBlocking blocking = {512, 4096, 8 << 20, 4 << 20, 6 * kMr, 512 / sizeof(C), 6 * kMr};
#else
  // Processors without AVX-512 have 256 or 512 KB of L2. Strips of 128 float32 columns, 72 rows before the next ones,
  // are 3 to 6% faster than those above on eight shapes from 128 x 784 x 128 to 1024^3, and 2% beside a neighbour who
  // takes the cache (geometric means; Zen 3, one thread).
  static constexpr GemmBlocking blocking = {512, 4096, 8 << 20, 4 << 20, 12 * kMr, 512 / sizeof(C), 12 * kMr};
#endif
};

#if defined(FASTOPS_HAS_AVX512_BF16)
template <>
struct Tile<bf16_pair> {
  using A = bf16_pair;
  using B = bf16_pair;
  using C = float;
  using Session = NoSession;
  static constexpr int mr = kMr, nr = kNr<float>;
  static constexpr int step = 2;
  static constexpr int k_align = 2;
  static constexpr bool readable = false, tiles_in_place = false;
  static constexpr GemmBlocking blocking = {1024, 8192, 8 << 20, 4 << 20, 20 * kMr, 256, 2 * kMr};
};
#endif

// The name of an algorithm that multiplies panels of P. algorithm_bf16 is for panels that a bfloat16 instruction
// multiplies.
template <class P>
constexpr KernelName tile_name(const char* algorithm, const char* algorithm_bf16) {
  return {Tile<P>::step > 1 ? algorithm_bf16 : algorithm, {Tile<P>::mr, Tile<P>::nr}};
}

// Operands that consist of `count` pieces of length k. Piece i of A starts a_at[i] elements after the start of A, piece
// i of B b_at[i] elements after the start of B. Without b_at, the pieces of B follow each other.
struct Pieces {
  int64_t count;
  const int64_t* a_at;  // may be null for one piece
  const int64_t* b_at = nullptr;
};

// R rows and V vectors of columns. If Tail, the last vector has cols - (V - 1) * size lanes.
template <class P, int R, int V, bool Tail>
__attribute__((noinline)) void micro(int64_t k, const P* a, int64_t a_rs, int64_t a_ks, const P* b, int64_t b_ks,
                                     int cols, const TileOut<typename Panel<P>::Compute>& out, const Pieces& pieces) {
  using C = typename Panel<P>::Compute;
  using Lanes = Vec<C>;
  constexpr int S = Lanes::size;
  constexpr int kGroups = (R + 2) / 3;  // rows 3g, 3g + 1 and 3g + 2 share a pointer, with offsets 0, a_rs and 2 a_rs
  const int tail = Tail ? cols - (V - 1) * S : S;

  Lanes acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) acc[r][v] = Lanes::zero();

  if constexpr (kFetchesC && !Tail) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
      if (!out.stream) __builtin_prefetch(out.c + r * out.c_rs, 1, 3);
  }
  const P* const b_begin = b;
  const char* ahead = static_cast<const char*>(out.ahead != nullptr ? out.ahead : b);
  for (int64_t i = 0; i < pieces.count; ++i) {
    const P* rows[kGroups];
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) rows[g] = a + (pieces.a_at != nullptr ? pieces.a_at[i] : 0) + 3 * g * a_rs;
    if (pieces.b_at != nullptr) b = b_begin + pieces.b_at[i];

    int64_t p = 0;
    // Steps of k, `count` at a time. Where A is in a packed panel, its elements are at constant offsets.
    const auto steps = [&]<int count, bool panel>() __attribute__((always_inline)) {
      for (; p + count <= k; p += count) {
        __builtin_prefetch(ahead, 0, 2);
        ahead += 64;
#pragma GCC unroll 4
        for (int s = 0; s < count; ++s) {
          typename Panel<P>::Row row[V];
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v)
            row[v] = Tail && v == V - 1 ? Panel<P>::load(b + v * S, tail) : Panel<P>::load(b + v * S);
          b += b_ks;
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r) {
            const P* const at = panel ? rows[0] + s * kMr + r : rows[r / 3] + (r % 3) * a_rs + s;
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) acc[r][v] = Panel<P>::multiply_add(at, row[v], acc[r][v]);
          }
        }
#pragma GCC unroll 4
        for (int g = 0; g < kGroups; ++g) rows[g] += count * (panel ? kMr : a_ks);
      }
    };
    if constexpr (kSteps > 1 && V == kNrVectors && !Tail) {
      if (a_ks == kMr && a_rs == 1)
        steps.template operator()<kSteps, true>();
      else if (a_ks == 1)
        steps.template operator()<kSteps, false>();
    }
    steps.template operator()<1, false>();
  }

  const auto load = [tail](const C* p, int v) {
    return Tail && v == V - 1 ? Lanes::load(p + v * S, tail) : Lanes::load(p + v * S);
  };
  if (out.prev != nullptr) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[r][v] = acc[r][v] + load(out.prev + r * out.prev_rs, v);
  }
  if (out.bias != nullptr) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      const Lanes bias = load(out.bias, v);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) acc[r][v] = acc[r][v] + bias;
    }
  }
  if (out.row_bias != nullptr) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Lanes bias = Lanes::set1(out.row_bias[r]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[r][v] = acc[r][v] + bias;
    }
  }
  if (out.add != nullptr) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[r][v] = acc[r][v] + load(out.add + r * out.add_rs, v);
  }
  if (out.relu) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[r][v] = max(Lanes::zero(), acc[r][v]);
  }
  if (out.relu == kRelu6) {
    const Lanes most = Lanes::set1(6);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[r][v] = min(most, acc[r][v]);
  }
  if (!Tail && out.stream) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) stream(acc[r][v], out.c + r * out.c_rs + v * S);
    return;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      C* const p = out.c + r * out.c_rs + v * S;
      if (Tail && v == V - 1)
        acc[r][v].store(p, tail);
      else
        acc[r][v].store(p);
    }
}

template <class P, int R>
inline void micro_cols(int64_t k, const P* a, int64_t a_rs, int64_t a_ks, const P* b, int64_t b_ks, int cols,
                       const TileOut<typename Panel<P>::Compute>& out, const Pieces& pieces) {
  constexpr int S = Vec<typename Panel<P>::Compute>::size;
  if (cols == 2 * S)
    micro<P, R, 2, false>(k, a, a_rs, a_ks, b, b_ks, cols, out, pieces);
  else if (cols > S)
    micro<P, R, 2, true>(k, a, a_rs, a_ks, b, b_ks, cols, out, pieces);
  else
    micro<P, R, 1, true>(k, a, a_rs, a_ks, b, b_ks, cols, out, pieces);
}

// A tile of rows x cols.
template <class P>
inline void micro_tile(int64_t k, const P* a, int64_t a_rs, int64_t a_ks, const P* b, int64_t b_ks, int rows, int cols,
                       const TileOut<typename Panel<P>::Compute>& out, const Pieces& pieces = {1, nullptr}) {
  switch (rows) {
#if defined(FASTOPS_32_REGISTERS)
    case 12:
      return micro_cols<P, 12>(k, a, a_rs, a_ks, b, b_ks, cols, out, pieces);
    case 11:
      return micro_cols<P, 11>(k, a, a_rs, a_ks, b, b_ks, cols, out, pieces);
    case 10:
      return micro_cols<P, 10>(k, a, a_rs, a_ks, b, b_ks, cols, out, pieces);
    case 9:
      return micro_cols<P, 9>(k, a, a_rs, a_ks, b, b_ks, cols, out, pieces);
    case 8:
      return micro_cols<P, 8>(k, a, a_rs, a_ks, b, b_ks, cols, out, pieces);
    case 7:
      return micro_cols<P, 7>(k, a, a_rs, a_ks, b, b_ks, cols, out, pieces);
#endif
    case 6:
      return micro_cols<P, 6>(k, a, a_rs, a_ks, b, b_ks, cols, out, pieces);
    case 5:
      return micro_cols<P, 5>(k, a, a_rs, a_ks, b, b_ks, cols, out, pieces);
    case 4:
      return micro_cols<P, 4>(k, a, a_rs, a_ks, b, b_ks, cols, out, pieces);
    case 3:
      return micro_cols<P, 3>(k, a, a_rs, a_ks, b, b_ks, cols, out, pieces);
    case 2:
      return micro_cols<P, 2>(k, a, a_rs, a_ks, b, b_ks, cols, out, pieces);
    default:
      return micro_cols<P, 1>(k, a, a_rs, a_ks, b, b_ks, cols, out, pieces);
  }
}

// The output of a product in storage type T: y = f(C + bias + residual), rounded once, and z = C + bias + residual
// where z is not null.
template <class T>
struct Output {
  T* y;
  int64_t rs;
  T* z;                    // null, or in the layout of y
  const Compute<T>* bias;  // null, or n contiguous values
  Rectifier relu;
  RowForward<T> f;  // null for identity and what relu says
  Activation activation;
  bool stream = false;
  const T* residual = nullptr;  // null, or in the layout of y; only where T is the compute type
  bool bias_of_rows = false;    // of products in blocks only: bias has m values instead
};

// The epilogue of complete sums: z, activations that are not computed in registers, and rounding.
template <class T>
inline void finish_rows(const Output<T>& out, const Compute<T>* tile, int64_t tile_rs, int64_t i, int64_t j, int rows,
                        int cols) {
  for (int r = 0; r < rows; ++r) {
    const int64_t at = (i + r) * out.rs + j;
    const Compute<T>* row = tile + r * tile_rs;
    if (out.z != nullptr) store_row<T>(row, out.z + at, cols);
    if (out.f != nullptr)
      out.f(row, out.y + at, cols, out.activation);
    else
      store_row<T>(row, out.y + at, cols);
  }
}

// An operand for the microkernel. Lane l, a multiple of the panel width, starts at p + l / width * panel.
template <class P>
struct PanelView {
  const P* p;
  int64_t panel;
  int64_t rs, ks;
};

// One k block of the tile of C at (i, j). Between k blocks, sums are kept in y if y has their type, else in `partial`.
template <class P, class T>
inline void output_tile(P, int64_t k, const PanelView<P>& a, const P* a_panel, const PanelView<P>& b, const P* b_panel,
                        int64_t i, int64_t j, int rows, int cols, bool first, bool last, const Output<T>& out,
                        Compute<T>* partial, int64_t partial_rs, const void* ahead) {
  using C = Compute<T>;
  TileOut<C> tile{};
  tile.ahead = ahead;
  C* sums;
  int64_t sums_rs;
  if constexpr (same_type<T, C>) {
    sums = out.y + i * out.rs + j;
    sums_rs = out.rs;
  } else {
    sums = partial;
    sums_rs = partial_rs;
  }
  if (!first) {
    tile.prev = sums;
    tile.prev_rs = sums_rs;
  }
  if (last) tile.bias = out.bias != nullptr ? out.bias + j : nullptr;
  if constexpr (same_type<T, C>) {
    if (last && out.residual != nullptr) {
      tile.add = out.residual + i * out.rs + j;
      tile.add_rs = out.rs;
    }
  }
  const bool in_registers = same_type<T, C> && out.f == nullptr && out.z == nullptr;
  if (!last || in_registers) {
    tile.c = sums;
    tile.c_rs = sums_rs;
    tile.relu = last ? out.relu : kNoRectifier;
    tile.stream = out.stream;
    micro_tile(k, a_panel, a.rs, a.ks, b_panel, b.ks, rows, cols, tile);
    return;
  }
  alignas(64) C buffer[kMr * kNr<C>];
  tile.c = buffer;
  tile.c_rs = kNr<C>;
  tile.relu = out.relu;
  micro_tile(k, a_panel, a.rs, a.ks, b_panel, b.ks, rows, cols, tile);
  finish_rows(out, buffer, kNr<C>, i, j, rows, cols);
}
