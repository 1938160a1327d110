// Correlation of a padded copy of a plane (planes.inl) with the taps of a filter, and its weight gradient. These
// are the direct kernels of channels_first convolutions that apply one filter to one plane.
#pragma once

#include "../../activation/cpu/rows.inl"
#include "../../common/cpu/common.inl"

template <int N>
struct Number {
  static constexpr int value = N;
};

// Taps in columns of KH. Tap i of a column is offset + i * step elements from the output's position in the copy.
template <class C>
struct TapColumns {
  int64_t columns;
  int64_t* offsets;
  C* weights;        // columns x KH; for the weight gradient columns x KH vectors of sums
  int64_t step;      // elements between the taps of a column
  int64_t row_step;  // elements between output rows: SH * step if KH > 1
};

// Rows of a block and vectors along a row, so many that 32 (16) registers also hold the weights of a column.
#if defined(FASTOPS_32_REGISTERS)
constexpr int kPlaneRows = 7;
constexpr int kPlaneVectors = 2;
#else
constexpr int kPlaneRows = 4;
constexpr int kPlaneVectors = 1;
#endif

// acc[r][v] += the sum over all taps, for R output rows and V vectors of positions.
template <int KH, int SH, int R, int V, class C>
inline void correlate_block(const TapColumns<C>& taps, const C* in, Vec<C> (&acc)[R][V]) {
  using Lanes = Vec<C>;
  constexpr int S = Lanes::size;
  for (int64_t c = 0; c < taps.columns; ++c) {
    const C* at = in + taps.offsets[c];
    if constexpr (KH == 1) {
      const Lanes w = Lanes::set1(taps.weights[c]);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r, at += taps.row_step)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) acc[r][v] = fma(Lanes::load(at + v * S), w, acc[r][v]);
    } else {
      Lanes w[KH];
#pragma GCC unroll 8
      for (int i = 0; i < KH; ++i) w[i] = Lanes::set1(taps.weights[c * KH + i]);
#pragma GCC unroll 32
      for (int i = 0; i < (R - 1) * SH + KH; ++i, at += taps.step) {
        Lanes x[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) x[v] = in_register(Lanes::load(at + v * S));
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const int tap = i - r * SH;
          if (tap < 0 || tap >= KH) continue;
#pragma GCC unroll 8
          for (int v = 0; v < V; ++v) acc[r][v] = fma(x[v], w[tap], acc[r][v]);
        }
      }
    }
  }
}

// The output: y = f(sums + bias). `finish` does what is not done in registers: 16-bit storage, z, activations other
// than ReLU and ReLU6. So the functions above are instantiated only for the compute types.
template <class C>
struct PlaneOutput {
  int64_t rs;  // elements between rows
  C* y;        // used if finish is null
  C bias;
  Rectifier relu;
  void (*finish)(const PlaneOutput& out, const C* sums, int64_t at, int count);
  void *stored, *z;
  Activation activation;
};

template <class T>
inline void finish_row(const PlaneOutput<Compute<T>>& out, const Compute<T>* sums, int64_t at, int count) {
  if (out.z != nullptr) store_row<T>(sums, static_cast<T*>(out.z) + at, count);
  T* const y = static_cast<T*>(out.stored) + at;
  if (out.relu || out.activation.kind == ActivationKind::identity)
    store_row<T>(sums, y, count);
  else
    row_forward<T>(out.activation.kind)(sums, y, count, out.activation);
}

template <class T>
inline PlaneOutput<Compute<T>> plane_output(void* y, void* z, int64_t rs, const Activation& activation) {
  using C = Compute<T>;
  const Rectifier relu = rectifier(activation, z);
  const bool plain = z == nullptr && (relu || activation.kind == ActivationKind::identity);
  const bool direct = same_type<T, C> && plain;
  return {rs, direct ? static_cast<C*>(y) : nullptr, 0, relu, direct ? nullptr : finish_row<T>, y, z, activation};
}

template <class T>
inline PlaneOutput<Compute<T>> offset(PlaneOutput<Compute<T>> out, int64_t elements) {
  if (out.y != nullptr) out.y += elements;
  out.stored = static_cast<T*>(out.stored) + elements;
  if (out.z != nullptr) out.z = static_cast<T*>(out.z) + elements;
  return out;
}

template <int KH, int SH, int R, int V, class C>
inline void correlate_tile(const TapColumns<C>& taps, const C* in, const PlaneOutput<C>& out, int64_t at, int count) {
  using Lanes = Vec<C>;
  constexpr int S = Lanes::size;
  Lanes acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[r][v] = Lanes::zero();
  correlate_block<KH, SH, R, V>(taps, in, acc);
  const Lanes bias = Lanes::set1(out.bias);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      acc[r][v] = acc[r][v] + bias;
      if (out.relu) acc[r][v] = rectified(acc[r][v], out.relu);
    }
  if (out.finish == nullptr) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      C* const y = out.y + at + r * out.rs;
#pragma GCC unroll 8
      for (int v = 0; v + 1 < V; ++v) acc[r][v].store(y + v * S);
      if (count == V * S)
        acc[r][V - 1].store(y + (V - 1) * S);
      else
        acc[r][V - 1].store(y + (V - 1) * S, count - (V - 1) * S);
    }
    return;
  }
  alignas(64) C rows[R * V * S];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[r][v].store(rows + (r * V + v) * S);
  for (int r = 0; r < R; ++r) out.finish(out, rows + r * V * S, at + r * out.rs, count);
}

template <int KH, int SH, int R, class C>
inline void correlate_rows(const TapColumns<C>& taps, const C* in, int64_t cols, const PlaneOutput<C>& out,
                           int64_t at) {
  constexpr int S = Vec<C>::size, V = kPlaneVectors;
  int64_t j = 0;
  for (; j + (V - 1) * S < cols; j += V * S)
    correlate_tile<KH, SH, R, V>(taps, in + j, out, at + j, static_cast<int>(smaller<int64_t>(V * S, cols - j)));
  if constexpr (V > 1)
    for (; j < cols; j += S)
      correlate_tile<KH, SH, R, 1>(taps, in + j, out, at + j, static_cast<int>(smaller<int64_t>(S, cols - j)));
}

// rows x cols outputs; `out` is the first of them.
template <int KH, int SH, class C>
void correlate(const TapColumns<C>& taps, const C* in, int64_t rows, int64_t cols, const PlaneOutput<C>& out) {
  const auto blocks = [&](auto height) {
    constexpr int R = decltype(height)::value;
    for (int64_t r = 0; r < rows; r += R) {
      const int64_t first = smaller(r, rows - R);  // the last block computes some rows a second time
      correlate_rows<KH, SH, R>(taps, in + first * taps.row_step, cols, out, first * out.rs);
    }
  };
  if (rows >= kPlaneRows)
    blocks(Number<kPlaneRows>{});
  else if (rows > 1)
    blocks(Number<2>{});
  else
    blocks(Number<1>{});
}

// sums[column][tap] += g x for a block of R rows of positions. g is zero past cols; x is not read past cols.
template <int KH, int SH, int R, class C>
inline void weight_rows(const TapColumns<C>& taps, const C* x, const C* g, int64_t g_rs, int64_t cols) {
  using Lanes = Vec<C>;
  constexpr int S = Lanes::size;
  for (int64_t j = 0; j < cols; j += S) {
    const int count = static_cast<int>(smaller<int64_t>(S, cols - j));
    Lanes grad[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) grad[r] = Lanes::load(g + r * g_rs + j, count);
    const auto add = [&](auto load) {
      for (int64_t c = 0; c < taps.columns; ++c) {
        const C* at = x + taps.offsets[c] + j;
        C* const sums = taps.weights + c * KH * S;
        Lanes acc[KH];
#pragma GCC unroll 8
        for (int i = 0; i < KH; ++i) acc[i] = Lanes::load(sums + i * S);
        if constexpr (KH == 1) {
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) acc[0] = fma(load(at + r * taps.row_step), grad[r], acc[0]);
        } else {
#pragma GCC unroll 32
          for (int i = 0; i < (R - 1) * SH + KH; ++i, at += taps.step) {
            const Lanes value = in_register(load(at));
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
              const int tap = i - r * SH;
              if (tap >= 0 && tap < KH) acc[tap] = fma(value, grad[r], acc[tap]);
            }
          }
        }
#pragma GCC unroll 8
        for (int i = 0; i < KH; ++i) acc[i].store(sums + i * S);
      }
    };
    if (count == S)
      add([](const C* p) { return Lanes::load(p); });
    else
      add([count](const C* p) { return Lanes::load(p, count); });
  }
}

template <int KH, int SH, class C>
void weight_sums(const TapColumns<C>& taps, const C* x, const C* g, int64_t g_rs, int64_t rows, int64_t cols) {
  constexpr int R = kPlaneRows;
  int64_t r = 0;
  for (; r + R <= rows; r += R) weight_rows<KH, SH, R>(taps, x + r * taps.row_step, g + r * g_rs, g_rs, cols);
  for (; r < rows; ++r) weight_rows<KH, SH, 1>(taps, x + r * taps.row_step, g + r * g_rs, g_rs, cols);
}

// body(KH, SH) with the height and vertical stride of the kernel, if there is an instance for them. Otherwise body(1,
// 1), with every tap as a column.
template <class Body>
inline void with_column(int64_t kh, int64_t sh, int64_t dh, Body&& body) {
  const Number<1> one;
  const Number<2> two;
  if (dh == 1 && sh == 1) {
    if (kh == 2) return body(two, one);
    if (kh == 3) return body(Number<3>{}, one);
    if (kh == 5) return body(Number<5>{}, one);
    if (kh == 7) return body(Number<7>{}, one);
  } else if (dh == 1 && sh == 2) {
    if (kh == 3) return body(Number<3>{}, two);
    if (kh == 5) return body(Number<5>{}, two);
  }
  body(one, one);
}
inline bool has_column(int64_t kh, int64_t sh, int64_t dh) {
  bool found = false;
  with_column(kh, sh, dh, [&](auto height, auto) { found = decltype(height)::value > 1; });
  return found;
}
