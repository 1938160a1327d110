// activation_forward, activation_backward, prelu_* and glu_*, each in one pass.
//
// Work is divided into blocks that depend only on the shape. Every element and every partial sum belongs to one block,
// so the result is bitwise the same for any number of threads.
#pragma once

#include "../../common/cpu/common.inl"
#include "../activation_math.inl"
#include "rows.inl"

constexpr int64_t kBlock = 8192;  // elements; a multiple of 64, so that a mask word belongs to one block

// The least number of elements per thread: waking a thread takes some microseconds. Measured: 32768, PyTorch's own
// value, for loops bound by memory. An element of a transcendental function costs several times as much.
inline int64_t grain(ActivationKind kind) {
  switch (kind) {
    case ActivationKind::identity:
    case ActivationKind::relu:
    case ActivationKind::relu6:
    case ActivationKind::leaky_relu:
    case ActivationKind::hardtanh:
    case ActivationKind::hardsigmoid:
    case ActivationKind::hardswish:
    case ActivationKind::hardshrink:
    case ActivationKind::softshrink:
    case ActivationKind::threshold:
      return 32768;
    default:
      return 12288;
  }
}

// body(row, first, count) for every block of rows x cols, `step` columns at a time, from the last block to the first.
// What the kernel before this one wrote last is then still in the L2 cache, and what is written last here is what the
// next kernel, which goes from first to last, reads first.
template <class Body>
void for_blocks(const Team& team, int64_t rows, int64_t cols, int64_t step, int64_t grain, Body body) {
  if (rows == 0 || cols == 0) return;
  const int64_t blocks_per_row = (cols + step - 1) / step, blocks = rows * blocks_per_row;
  parallel(team, threads_for(team, rows * cols, blocks, grain), [&](Crew& crew) {
    crew.divide<false>(blocks, [&](int64_t begin, int64_t end) {
      int64_t row = (end - 1) / blocks_per_row, first = (end - 1) % blocks_per_row * step;
      for (int64_t block = end; block > begin; --block) {
        body(row, first, smaller(step, cols - first));
        first -= step;
        if (first < 0) {
          first = (blocks_per_row - 1) * step;
          --row;
        }
      }
    });
  });
}

// The same for blocks of kBlock elements: of one row, or several short rows in turn.
template <class Body>
void for_rows(const Team& team, int64_t rows, int64_t cols, int64_t grain, Body body) {
  const int64_t several = larger<int64_t>(1, kBlock / larger<int64_t>(1, cols));
  for_blocks(team, ceil_div(rows, several), cols, kBlock, ceil_div(grain, several),
             [&](int64_t block, int64_t first, int64_t count) {
               const int64_t end = smaller((block + 1) * several, rows);
               for (int64_t row = block * several; row < end; ++row) body(row, first, count);
             });
}

// Outputs of at least this many bytes are written with non-temporal stores. They would not stay in the caches, and an
// ordinary store that misses reads its cache line first. Measured with 64 MB of ReLU on Granite Rapids, 2 threads.
constexpr int64_t kStreamOutputBytes = int64_t{32} << 20;

template <class S>
inline bool streams(const S* y, const void* x, int64_t rows, int64_t cols) {
  return rows == 1 && cols * static_cast<int64_t>(sizeof(S)) >= kStreamOutputBytes && y != x &&
         reinterpret_cast<uintptr_t>(y) % 64 == 0;
}

// A copy with non-temporal stores. `to` is aligned to 64 bytes.
inline void stream_copy(const unsigned char* from, unsigned char* to, int64_t bytes) {
  int64_t i = 0;
#if defined(FASTOPS_VEC_AVX512)
  for (; i + 64 <= bytes; i += 64) _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_load_si512(from + i));
#elif defined(FASTOPS_VEC_AVX2)
  for (; i + 32 <= bytes; i += 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm256_load_si256(reinterpret_cast<const __m256i*>(from + i)));
#endif
  for (; i < bytes; ++i) to[i] = from[i];
}

// Writes y[0, count) with non-temporal stores. row(first, buffer, n) computes n elements into a buffer that stays in
// L1.
template <class S, class Row>
inline void stream_row(S* y, int64_t count, Row row) {
  constexpr int64_t step = 1024;  // a multiple of 64, so that each piece begins a mask word and a cache line
  alignas(64) S buffer[step];
  for (int64_t first = 0; first < count; first += step) {
    const int64_t n = smaller(step, count - first);
    row(first, buffer, n);
    stream_copy(reinterpret_cast<const unsigned char*>(buffer), reinterpret_cast<unsigned char*>(y + first),
                n * static_cast<int64_t>(sizeof(S)));
  }
#if defined(FASTOPS_VEC_AVX512) || defined(FASTOPS_VEC_AVX2)
  _mm_sfence();
#endif
}

// Writes y[0, count), in place or as above.
template <class S, class Row>
inline void write_row(bool stream, S* y, int64_t count, Row row) {
  if (stream)
    stream_row(y, count, row);
  else
    row(0, y, count);
}

inline uint64_t load_bits(const uint8_t* p, int bytes) {
  uint64_t bits = 0;
  for (int i = 0; i < bytes; ++i) bits |= static_cast<uint64_t>(p[i]) << (8 * i);
  return bits;
}
inline void store_bits(uint8_t* p, int bytes, uint64_t bits) {
  for (int i = 0; i < bytes; ++i) p[i] = static_cast<uint8_t>(bits >> (8 * i));
}

// Like forward_row. It also writes the mask: element i is bit i % 8 of mask[i / 8].
template <class Kind, class S>
void forward_mask_row(const S* x, S* y, uint8_t* mask, int64_t n, const Activation& activation) {
  using V = Vec<Compute<S>>;
  const auto p = parameters<S>(activation);
  int64_t i = 0;
  for (; i + 64 <= n; i += 64, mask += 8) {
    uint64_t bits = 0;
    for (int j = 0; j < 64; j += V::size) {
      const V v = V::load(x + i + j);
      Kind::forward(v, p).store(y + i + j);
      bits |= static_cast<uint64_t>(Kind::inside(v, p).bits()) << j;
    }
    store_bits(mask, 8, bits);
  }
  const int tail = static_cast<int>(n - i);
  if (tail == 0) return;
  uint64_t bits = 0;
  for (int j = 0; j < tail; j += V::size) {
    const int count = static_cast<int>(smaller(V::size, tail - j));
    const V v = V::load(x + i + j, count);
    Kind::forward(v, p).store(y + i + j, count);
    bits |= static_cast<uint64_t>(Kind::inside(v, p).bits()) << j;
  }
  store_bits(mask, (tail + 7) / 8, bits & ((uint64_t{1} << tail) - 1));
}

template <class Kind, class S>
void backward_mask_row(const S* grad_y, const uint8_t* mask, S* grad_x, int64_t n, const Activation& activation) {
  using C = Compute<S>;
  using V = Vec<C>;
  const auto p = parameters<S>(activation);
  int64_t i = 0;
  for (; i + 64 <= n; i += 64, mask += 8) {
    const uint64_t bits = load_bits(mask, 8);
    for (int j = 0; j < 64; j += V::size) {
      const Mask<C> inside = Mask<C>::from_bits(static_cast<unsigned>(bits >> j));
      Kind::apply(inside, V::load(grad_y + i + j), p).store(grad_x + i + j);
    }
  }
  const int tail = static_cast<int>(n - i);
  if (tail == 0) return;
  const uint64_t bits = load_bits(mask, (tail + 7) / 8);
  for (int j = 0; j < tail; j += V::size) {
    const int count = static_cast<int>(smaller(V::size, tail - j));
    const Mask<C> inside = Mask<C>::from_bits(static_cast<unsigned>(bits >> j));
    Kind::apply(inside, V::load(grad_y + i + j, count), p).store(grad_x + i + j, count);
  }
}

template <class S>
using ForwardMaskRow = void (*)(const S* x, S* y, uint8_t* mask, int64_t n, const Activation&);
template <class S>
using BackwardMaskRow = void (*)(const S* grad_y, const uint8_t* mask, S* grad_x, int64_t n, const Activation&);

template <class S>
ForwardMaskRow<S> find_forward_mask_row(ActivationKind kind) {
  return with_mask_kind(kind, [](auto k) -> ForwardMaskRow<S> { return forward_mask_row<decltype(k), S>; });
}

template <class S>
BackwardMaskRow<S> find_backward_mask_row(ActivationKind kind) {
  return with_mask_derivative(kind, [](auto k) -> BackwardMaskRow<S> { return backward_mask_row<decltype(k), S>; });
}

template <class S>
struct ForwardKernels {
  ForwardRow<S, S> row;
  ForwardMaskRow<S> mask_row;  // with a mask
};

template <class S>
void activation_forward(const Bound<ActivationForward>& args, const ForwardKernels<S>& kernels, const Team& team) {
  const S* x = static_cast<const S*>(args.x);
  S* y = static_cast<S*>(args.y);
  int64_t rows = args.rows, cols = args.cols;
  if (args.x_row_stride == cols && (args.mask == nullptr || cols % 8 == 0)) {
    cols *= rows;
    rows = 1;
  }
  const int64_t per_thread = grain(args.activation.kind);
  if (args.mask == nullptr) {
    const ForwardRow<S, S> row_kernel = kernels.row;
    const bool stream = streams(y, x, rows, cols);
    for_rows(team, rows, cols, per_thread, [&](int64_t row, int64_t first, int64_t count) {
      const S* const from = x + row * args.x_row_stride + first;
      S* const to = y + row * cols + first;
      write_row(stream, to, count,
                [&](int64_t i, S* piece, int64_t n) { row_kernel(from + i, piece, n, args.activation); });
    });
  } else {
    const ForwardMaskRow<S> row_kernel = kernels.mask_row;
    const bool stream = streams(y, x, rows, cols);
    for_rows(team, rows, cols, per_thread, [&](int64_t row, int64_t first, int64_t count) {
      uint8_t* const mask = args.mask + row * mask_row_bytes(cols) + first / 8;
      const S* const from = x + row * args.x_row_stride + first;
      S* const to = y + row * cols + first;
      write_row(stream, to, count,
                [&](int64_t i, S* piece, int64_t n) { row_kernel(from + i, piece, mask + i / 8, n, args.activation); });
    });
  }
}

template <class S>
struct BackwardKernels {
  BackwardRow<S, S> row;
  BackwardMaskRow<S> mask_row;  // from a mask
};

template <class S>
void activation_backward(const Bound<ActivationBackward>& args, const BackwardKernels<S>& kernels, const Team& team) {
  const S* grad_y = static_cast<const S*>(args.grad_y);
  S* grad_x = static_cast<S*>(args.grad_x);
  const bool masked = args.saved_kind == Saved::mask;
  int64_t rows = args.rows, cols = args.cols;
  if (args.grad_y_row_stride == cols && (masked ? cols % 8 == 0 : args.saved_row_stride == cols)) {
    cols *= rows;
    rows = 1;
  }
  const int64_t per_thread = grain(args.activation.kind);
  const bool stream = grad_x != args.saved && streams(grad_x, args.grad_y, rows, cols);
  if (masked) {
    const uint8_t* mask = static_cast<const uint8_t*>(args.saved);
    const BackwardMaskRow<S> row_kernel = kernels.mask_row;
    for_rows(team, rows, cols, per_thread, [&](int64_t row, int64_t first, int64_t count) {
      const S* const from = grad_y + row * args.grad_y_row_stride + first;
      const uint8_t* const bits = mask + row * mask_row_bytes(cols) + first / 8;
      S* const to = grad_x + row * cols + first;
      write_row(stream, to, count,
                [&](int64_t i, S* piece, int64_t n) { row_kernel(from + i, bits + i / 8, piece, n, args.activation); });
    });
  } else {
    // Nothing was saved for the identity. Its loop gets grad_y as `saved` and ignores the value.
    const bool nothing = args.saved_kind == Saved::nothing;
    const S* saved = nothing ? grad_y : static_cast<const S*>(args.saved);
    const int64_t saved_stride = nothing ? args.grad_y_row_stride : args.saved_row_stride;
    const BackwardRow<S, S> row_kernel = kernels.row;
    for_rows(team, rows, cols, per_thread, [&](int64_t row, int64_t first, int64_t count) {
      const S* const from = grad_y + row * args.grad_y_row_stride + first;
      const S* const kept = saved + row * saved_stride + first;
      S* const to = grad_x + row * cols + first;
      write_row(stream, to, count,
                [&](int64_t i, S* piece, int64_t n) { row_kernel(from + i, kept + i, piece, n, args.activation); });
    });
  }
}

constexpr KernelName kElementwise{"elementwise"};

void plan_call(Plan<ActivationForward>& plan) {
  const ActivationForward& call = plan.call;
  if (kInference && call.with_mask) return;
  with_dtype(call.dtype, [&](auto type) {
    using S = decltype(type);
    const ActivationKind kind = call.activation.kind;
    const ForwardKernels<S> kernels = {call.with_mask ? nullptr : find_forward_row<S, S>(kind),
                                       !kInference && call.with_mask ? find_forward_mask_row<S>(kind) : nullptr};
    decide(plan, kElementwise, 0, kernels,
           [](auto& args, auto& kernels, auto*, auto& team) { activation_forward<S>(args, kernels, team); });
  });
}

void plan_call(Plan<ActivationBackward>& plan) {
  const ActivationBackward& call = plan.call;
  with_dtype(call.dtype, [&](auto type) {
    using S = decltype(type);
    const ActivationKind kind = call.activation.kind;
    const bool masked = call.saved_kind == Saved::mask, from_output = call.saved_kind == Saved::output;
    const BackwardKernels<S> kernels = {masked ? nullptr : find_backward_row<S, S>(kind, from_output),
                                        masked ? find_backward_mask_row<S>(kind) : nullptr};
    decide(plan, kElementwise, 0, kernels,
           [](auto& args, auto& kernels, auto*, auto& team) { activation_backward<S>(args, kernels, team); });
  });
}

// ---- PReLU
//
// x[outer, channels, inner] is treated as a matrix. If inner > 1, it is [outer * channels, inner] with one weight per
// row; if inner == 1, [outer, channels] with one weight per column. With one channel, it is a single row.

struct PreluShape {
  int64_t rows, cols;
  bool weight_per_column;
  int64_t blocks_per_row;  // with a weight per row: partial sums of grad_w in a row
  int64_t chunk, chunks;   // with a weight per column: the rows of a partial sum of grad_w, and the number of chunks
};

inline PreluShape prelu_shape(int64_t outer, int64_t channels, int64_t inner) {
  PreluShape shape = {outer * channels, inner, false, 0, 0, 0};
  if (channels == 1) {
    shape.rows = 1;
    shape.cols = outer * inner;
  } else if (inner == 1) {
    shape.rows = outer;
    shape.cols = channels;
    shape.weight_per_column = true;
    // At most 64 partial sums per column, to keep the workspace small.
    shape.chunk = outer / 64 + 1 > 64 ? outer / 64 + 1 : 64;
    shape.chunks = (outer + shape.chunk - 1) / shape.chunk;
  }
  shape.blocks_per_row = (shape.cols + kBlock - 1) / kBlock;
  return shape;
}

constexpr int kColumns = 256;  // weights that are converted to the compute type at a time

// Converts weights [first, first + count), count <= kColumns, and pads them with zeros to whole vectors.
template <class S>
void load_weights(const S* w, int64_t stride, int64_t first, int64_t count, Compute<S>* buffer) {
  using V = Vec<Compute<S>>;
  for (int64_t i = 0; i < count; ++i) buffer[i] = load_one(w + (first + i) * stride);
  for (int64_t i = count; i % V::size != 0; ++i) buffer[i] = 0;
}

template <class C>
inline Vec<C> prelu(Vec<C> x, Vec<C> w) {
  return select(gt(x, Vec<C>::zero()), x, w * x);
}

template <class S>
void prelu_forward(const Bound<PreluForward>& args, const Team& team) {
  using C = Compute<S>;
  using V = Vec<C>;
  const S* x = static_cast<const S*>(args.x);
  const S* w = static_cast<const S*>(args.w);
  S* y = static_cast<S*>(args.y);
  const PreluShape shape = prelu_shape(args.outer, args.channels, args.inner);
  const int64_t cols = shape.cols, grain = 32768;
  if (!shape.weight_per_column) {
    const bool stream = streams(y, x, shape.rows, cols);
    for_rows(team, shape.rows, cols, grain, [&](int64_t row, int64_t first, int64_t count) {
      const V weight = V::set1(load_one(w + row % args.channels * args.w_stride));
      const S* from = x + row * cols + first;
      S* to = y + row * cols + first;
      const auto compute = [&](int64_t start, S* piece, int64_t n) {
        const S* const p = from + start;
        int64_t i = 0;
        for (; i + V::size <= n; i += V::size) prelu(V::load(p + i), weight).store(piece + i);
        const int tail = static_cast<int>(n - i);
        if (tail > 0) prelu(V::load(p + i, tail), weight).store(piece + i, tail);
      };
      write_row(stream, to, count, compute);
    });
    return;
  }
  // In blocks of rows, so that a weight is loaded once for many rows.
  const int64_t chunk = kBlock / cols + 1, chunks = (shape.rows + chunk - 1) / chunk;
  for_blocks(team, chunks, cols, kColumns, grain / chunk + 1, [&](int64_t block, int64_t first, int64_t count) {
    C weights[kColumns];
    load_weights(w, args.w_stride, first, count, weights);
    for (int64_t row = block * chunk; row < smaller((block + 1) * chunk, shape.rows); ++row) {
      const S* from = x + row * cols + first;
      S* to = y + row * cols + first;
      int64_t i = 0;
      for (; i + V::size <= count; i += V::size) prelu(V::load(from + i), V::load(weights + i)).store(to + i);
      const int tail = static_cast<int>(count - i);
      if (tail > 0) prelu(V::load(from + i, tail), V::load(weights + i)).store(to + i, tail);
    }
  });
}

inline size_t prelu_backward_workspace(const PreluBackward& args) {
  if (!args.with_grad_w) return 0;
  const PreluShape shape = prelu_shape(args.outer, args.channels, args.inner);
  const int64_t sums = shape.weight_per_column ? shape.chunks * shape.cols : shape.rows * shape.blocks_per_row;
  return static_cast<size_t>(sums) * (args.dtype == DType::f64 ? 8 : 4);
}

// The sum of first[i * stride] for i < count.
template <class C>
inline double sum_partials(const C* first, int64_t count, int64_t stride) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(first[i * stride]);
  return sum;
}

template <class S>
void prelu_backward(const Bound<PreluBackward>& args, void* workspace, const Team& team) {
  using C = Compute<S>;
  using V = Vec<C>;
  const S* grad_y = static_cast<const S*>(args.grad_y);
  const S* x = static_cast<const S*>(args.x);
  const S* w = static_cast<const S*>(args.w);
  S* grad_x = static_cast<S*>(args.grad_x);
  S* grad_w = static_cast<S*>(args.grad_w);
  C* sums = static_cast<C*>(workspace);
  const PreluShape shape = prelu_shape(args.outer, args.channels, args.inner);
  const int64_t cols = shape.cols, grain = 24576;

  // One vector: stores grad_x, if wanted, and returns the contribution to grad_w.
  const auto step = [&](int64_t at, int tail, V weight) {
    const V g = tail ? V::load(grad_y + at, tail) : V::load(grad_y + at);
    const V v = tail ? V::load(x + at, tail) : V::load(x + at);
    const Mask<C> positive = gt(v, V::zero());
    if (grad_x != nullptr) {
      const V result = select(positive, g, weight * g);
      if (tail)
        result.store(grad_x + at, tail);
      else
        result.store(grad_x + at);
    }
    return select(positive, V::zero(), g * v);
  };

  if (!shape.weight_per_column) {
    for_rows(team, shape.rows, cols, grain, [&](int64_t row, int64_t first, int64_t count) {
      const V weight = V::set1(load_one(w + row % args.channels * args.w_stride));
      const int64_t at = row * cols + first;
      V even = V::zero(), odd = V::zero();
      int64_t i = 0;
      for (; i + 2 * V::size <= count; i += 2 * V::size) {
        even = even + step(at + i, 0, weight);
        odd = odd + step(at + i + V::size, 0, weight);
      }
      for (; i < count; i += V::size) {
        const int64_t left = count - i;
        even = even + step(at + i, left < V::size ? static_cast<int>(left) : 0, weight);
      }
      if (grad_w != nullptr) sums[row * shape.blocks_per_row + first / kBlock] = reduce_add(even + odd);
    });
    if (grad_w == nullptr) return;
    const int64_t groups = shape.rows / args.channels;  // rows that share a weight
    for_blocks(team, 1, args.channels, 64, 64, [&](int64_t, int64_t first, int64_t count) {
      for (int64_t c = first; c < first + count; ++c) {
        double sum = 0;
        for (int64_t group = 0; group < groups; ++group)
          sum += sum_partials(sums + (group * args.channels + c) * shape.blocks_per_row, shape.blocks_per_row, 1);
        V::set1(static_cast<C>(sum)).store(grad_w + c, 1);
      }
    });
    return;
  }

  for_blocks(team, shape.chunks, cols, kColumns, grain / shape.chunk + 1,
             [&](int64_t block, int64_t first, int64_t count) {
               C weights[kColumns], columns[kColumns] = {};
               load_weights(w, args.w_stride, first, count, weights);
               for (int64_t row = block * shape.chunk; row < smaller((block + 1) * shape.chunk, shape.rows); ++row) {
                 for (int64_t i = 0; i < count; i += V::size) {
                   const int64_t left = count - i;
                   const int tail = left < V::size ? static_cast<int>(left) : 0;
                   const V added = step(row * cols + first + i, tail, V::load(weights + i));
                   (V::load(columns + i) + added).store(columns + i);
                 }
               }
               if (grad_w == nullptr) return;
               for (int64_t i = 0; i < count; ++i) sums[block * cols + first + i] = columns[i];
             });
  if (grad_w == nullptr) return;
  for_blocks(team, 1, cols, 64, 1024, [&](int64_t, int64_t first, int64_t count) {
    for (int64_t c = first; c < first + count; ++c)
      V::set1(static_cast<C>(sum_partials(sums + c, shape.chunks, cols))).store(grad_w + c, 1);
  });
}

void plan_call(Plan<PreluForward>& plan) {
  with_dtype(plan.call.dtype, [&](auto type) {
    decide(plan, kElementwise, 0, [](auto& args, auto*, auto& team) { prelu_forward<decltype(type)>(args, team); });
  });
}

void plan_call(Plan<PreluBackward>& plan) {
  with_dtype(plan.call.dtype, [&](auto type) {
    decide(plan, kElementwise, prelu_backward_workspace(plan.call),
           [](auto& args, auto* workspace, auto& team) { prelu_backward<decltype(type)>(args, workspace, team); });
  });
}

// ---- GLU

constexpr int64_t kGluGrain = 12288;

template <class S>
void glu_forward(const Bound<GluForward>& args, const Team& team) {
  using V = Vec<Compute<S>>;
  const S* x = static_cast<const S*>(args.x);
  S* y = static_cast<S*>(args.y);
  const bool stream = streams(y, x, args.outer, args.inner);
  for_rows(team, args.outer, args.inner, kGluGrain, [&](int64_t row, int64_t first, int64_t count) {
    S* to = y + row * args.inner + first;
    const auto compute = [&](int64_t start, S* piece, int64_t n) {
      const S* const a = x + 2 * row * args.inner + first + start;
      const S* const b = a + args.inner;
      int64_t i = 0;
      for (; i + V::size <= n; i += V::size) (V::load(a + i) * sigmoid<S>(V::load(b + i))).store(piece + i);
      const int tail = static_cast<int>(n - i);
      if (tail > 0) (V::load(a + i, tail) * sigmoid<S>(V::load(b + i, tail))).store(piece + i, tail);
    };
    write_row(stream, to, count, compute);
  });
}

template <class S>
void glu_backward(const Bound<GluBackward>& args, const Team& team) {
  using C = Compute<S>;
  using V = Vec<C>;
  const S* grad_y = static_cast<const S*>(args.grad_y);
  const S* x = static_cast<const S*>(args.x);
  S* grad_x = static_cast<S*>(args.grad_x);
  for_rows(team, args.outer, args.inner, kGluGrain, [&](int64_t row, int64_t first, int64_t count) {
    const S* a = x + 2 * row * args.inner + first;
    const S* g = grad_y + row * args.inner + first;
    S* to = grad_x + 2 * row * args.inner + first;
    const auto step = [&](int64_t i, auto... tail) {
      const V gate = sigmoid<C>(V::load(a + args.inner + i, tail...)), from = V::load(g + i, tail...);
      const V grad_a = from * gate;  // gate has float32 precision also for 16-bit types, as 1 - gate cancels
      const V grad_b = grad_a * (set<C>(1) - gate) * V::load(a + i, tail...);
      grad_a.store(to + i, tail...);
      grad_b.store(to + args.inner + i, tail...);
    };
    int64_t i = 0;
    for (; i + V::size <= count; i += V::size) step(i);
    if (i < count) step(i, static_cast<int>(count - i));
  });
}

void plan_call(Plan<GluForward>& plan) {
  with_dtype(plan.call.dtype, [&](auto type) {
    decide(plan, kElementwise, 0, [](auto& args, auto*, auto& team) { glu_forward<decltype(type)>(args, team); });
  });
}

void plan_call(Plan<GluBackward>& plan) {
  with_dtype(plan.call.dtype, [&](auto type) {
    decide(plan, kElementwise, 0, [](auto& args, auto*, auto& team) { glu_backward<decltype(type)>(args, team); });
  });
}
