// The kernels of mlp.h: every block computes all layers of a narrow network, one after the other.
//
// A tile is kRows rows of the batch. In shared memory it has kWidth columns; columns past the width of a layer are
// zero. Forward, a block keeps the weights of all layers in shared memory, if they fit, and computes all layers for a
// tile. The sums of a product stay in registers, and the output of a layer overwrites its input. Backward, a block goes
// through the layers from the last to the first, and for each layer through all its tiles. So it holds the weights of
// one layer in shared memory, and the whole gradient of these weights in registers. The gradient of a tile passes from
// one layer to the next through global memory (L2); only the same block reads it.
#pragma once

#include "../../gemm/cuda/gemm.cuh"
#include "../mlp.h"

namespace fastops::cuda {
namespace {

// ---- the kinds of products
//
//   Forward         C = y_l W^T [rows, n]    A = y_l [rows, k]     B = W [n, k]
//   InputGradient   C = g W [rows, k]        A = g [rows, n]       B = W transposed
//   WeightGradient  C = g^T y_l [n, k]       A = g transposed      B = y_l transposed
//
// Every operand is a part of a tile or of weights. Their rows are kPitch elements apart.

template <class Element, int kWidth_>
struct MlpMma16 {
  using S = Element;
  static constexpr int kWidth = kWidth_, kPitch = kWidth + 8, kWarpsN = kWidth / 32;
  using Forward = Mma16<S, 2, kWarpsN, 32, 32, true, true, kPitch - 32, kPitch - 32>;
  using InputGradient = Mma16<S, 2, kWarpsN, 32, 32, true, false, kPitch - 32>;
  using WeightGradient = Mma16<S, 2, kWarpsN, kWidth / 2, 32, false, false>;
};

template <int kWidth_>
struct MlpTf32 {
  using S = float;
  static constexpr int kWidth = kWidth_, kPitch = kWidth + 4, kWarpsN = kWidth / 32;
  using Forward = MmaTf32<2, kWarpsN, 32, 32, true, kPitch - 16, 4>;
  using InputGradient = Forward;
  using WeightGradient = MmaTf32<2, kWarpsN, kWidth / 2, 32, false, 4, 4>;
};

template <int kWidth_>
struct MlpSimt {
  using S = float;
  static constexpr int kWidth = kWidth_, kPitch = kWidth + 4, kBlocks = kWidth / 64;
  // A thread has 8 x 8 elements, and a tile 128 rows. For narrow networks, backward has 4 x 4 elements and 64 rows.
  using Forward = Simt<float, 4, kBlocks, 2, true, kPitch - 16>;
  using InputGradient = Simt<float, 4, 2, kBlocks, true, kPitch - 16>;
  using WeightGradient = Simt<float, 4, 2, kBlocks>;
};

// ---- tiles

// Starts to copy a matrix of rows x cols to a tile of kTileRows x kWidth; the rest of the tile becomes zero. The copy
// is complete after cp_async_commit and a wait. vectors: `from` and `stride` allow 16-byte copies.
template <int kThreads, int kTileRows, int kWidth, int kPitch, class S>
__device__ inline void fetch_rows(S* tile, const S* from, int64_t stride, int rows, int cols, bool vectors) {
  if (vectors) {
    constexpr int per_row = kWidth / kVector<S>;
    for (int i = static_cast<int>(threadIdx.x); i < kTileRows * per_row; i += kThreads) {
      const int row = i / per_row, col = i % per_row * kVector<S>, left = cols - col;
      const int count = row >= rows || left <= 0 ? 0 : left < kVector<S> ? left : kVector<S>;
      cp_async_16(tile + row * kPitch + col, count > 0 ? from + row * stride + col : from,
                  count * static_cast<int>(sizeof(S)));
    }
    return;
  }
  for (int i = static_cast<int>(threadIdx.x); i < kTileRows * kWidth; i += kThreads) {
    const int row = i / kWidth, col = i % kWidth;
    tile[row * kPitch + col] = row < rows && col < cols ? from[row * stride + col] : S{};
  }
}

// Copies a tile to a matrix. Before it stores a vector, it calls change(values, row, col).
template <int kThreads, int kTileRows, int kWidth, int kPitch, class S, class Change>
__device__ inline void store_rows(S* to, int64_t stride, int rows, int cols, const S* tile, bool vectors,
                                  Change change) {
  constexpr int per_row = kWidth / kVector<S>;
  for (int i = static_cast<int>(threadIdx.x); i < kTileRows * per_row; i += kThreads) {
    const int row = i / per_row, col = i % per_row * kVector<S>, left = cols - col;
    if (row >= rows || left <= 0) continue;
    alignas(16) S values[kVector<S>];
    load_unit(values, tile + row * kPitch + col, kVector<S>, true);
    change(values, row, col);
    store_unit(to + row * stride + col, values, left < kVector<S> ? left : kVector<S>, vectors);
  }
}

// Starts to copy weights [n, k], or their transpose, to kWidth x kWidth; the rest becomes zero. Complete as in
// fetch_rows.
template <int kThreads, int kWidth, int kPitch, bool transposed, class S>
__device__ inline void fetch_weights(S* tile, const S* w, int n, int k) {
  if constexpr (!transposed) {
    const bool vectors = reinterpret_cast<uintptr_t>(w) % 16 == 0 && k % kVector<S> == 0;
    fetch_rows<kThreads, kWidth, kWidth, kPitch>(tile, w, k, n, k, vectors);
  } else {
    for (int i = static_cast<int>(threadIdx.x); i < kWidth * kWidth; i += kThreads) {
      const int row = i / kWidth, col = i % kWidth;
      const bool inside = row < n && col < k;
      cp_async_element<sizeof(S)>(tile + col * kPitch + row, inside ? w + row * k + col : w, inside ? sizeof(S) : 0);
    }
  }
}

// multiplier.sum += A B^T for operands in shared memory, over `depth` of k, rounded up to whole steps.
template <class Multiplier, class S>
__device__ inline void multiply_resident(Multiplier& multiplier, const S* a, const S* b, int depth) {
  for (int k = 0; k < depth; k += Multiplier::kTileK)
    multiplier.multiply(a + Multiplier::A::offset(0, k), b + Multiplier::B::offset(0, k));
}

// Not inlined, like `activate`. Only relu is worth its code in the kernel.
template <class S>
__device__ __noinline__ Pair<Compute<S>> differentiate(ActivationKind kind, bool from_output, Parameters<S> p,
                                                       Pair<Compute<S>> g, Pair<Compute<S>> saved) {
  using V = Vec<Compute<S>>;
  return with_derivative(kind, from_output, [&](auto k) -> Pair<Compute<S>> {
    return {decltype(k)::backward(V{g.first}, V{saved.first}, p).v,
            decltype(k)::backward(V{g.second}, V{saved.second}, p).v};
  });
}

template <class S>
__device__ inline Pair<Compute<S>> load_pair(const S* from) {
  const auto pair = *reinterpret_cast<const Pair<S>*>(from);
  return {to_compute(pair.first), to_compute(pair.second)};
}

// ---- forward

template <class S>
struct MlpForwardTask {
  MlpForward call;
  MlpForward::Pointers pointers;
  Parameters<S> hidden, output;
  int64_t hidden_stride;
  bool save_pre_activations;  // also those of hidden layers
  bool x_vectors, y_vectors, z_pairs;
  bool resident;  // all weights stay in shared memory; else every tile loads the weights of each layer
  int stages;     // 2: the next tile is loaded while this one is computed
};

template <class Kind>
constexpr int kMlpForwardTile = Kind::Forward::kTileM * Kind::kPitch;  // elements
template <class Kind>
constexpr int kMlpWeights = Kind::kWidth * Kind::kPitch;

// At least one block per multiprocessor. With nvcc's own guess, float32 kernels have too few registers on sm_90.
template <class Kind>
__global__ void __launch_bounds__(Kind::Forward::kThreads, 1)
    mlp_forward_kernel(const __grid_constant__ MlpForwardTask<typename Kind::S> task) {
  using S = typename Kind::S;
  using Product = typename Kind::Forward;
  constexpr int threads = Product::kThreads, width = Kind::kWidth, pitch = Kind::kPitch, tile_rows = Product::kTileM;
  constexpr bool transposed = !Product::B::kKMajor;
  const MlpForward& call = task.call;
  const MlpForward::Pointers& pointers = task.pointers;
  const MlpShape& shape = call.shape;
  const int layers = shape.layers, thread = static_cast<int>(threadIdx.x);
  const auto width_of = [&](int l) { return static_cast<int>(shape.widths[l]); };

  float* const biases = static_cast<float*>(shared_memory());
  S* const weights = reinterpret_cast<S*>(biases + layers * width);
  S* const stages = weights + (task.resident ? layers : 1) * kMlpWeights<Kind>;
  const auto weights_to = [&](int l, S* to) {
    fetch_weights<threads, width, pitch, transposed>(to, static_cast<const S*>(pointers.w[l]), width_of(l + 1),
                                                     width_of(l));
  };
  const auto rows_of = [&](int64_t tile) {
    const int64_t left = shape.m - tile * tile_rows;
    return left < tile_rows ? static_cast<int>(left) : tile_rows;
  };
  const auto fetch = [&](int64_t tile, S* to) {
    fetch_rows<threads, tile_rows, width, pitch>(
        to, static_cast<const S*>(pointers.x) + tile * tile_rows * call.x_row_stride, call.x_row_stride, rows_of(tile),
        width_of(0), task.x_vectors);
  };

  for (int i = thread; i < layers * width; i += threads) {
    const S* const b = static_cast<const S*>(pointers.bias[i / width]);
    biases[i] = b != nullptr && i % width < width_of(i / width + 1) ? to_compute(b[i % width]) : 0.0f;
  }
  if (task.resident)
    for (int l = 0; l < layers; ++l) weights_to(l, weights + l * kMlpWeights<Kind>);

  const int64_t tiles = (shape.m + tile_rows - 1) / tile_rows;
  S* act = stages;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int rows = rows_of(tile);
    if (task.stages == 1 || tile == blockIdx.x) {
      __syncthreads();  // nobody reads the tile before this one any more
      fetch(tile, act);
      cp_async_commit();
    }
    cp_async_wait<0>();
    __syncthreads();  // this tile is there for all, and nobody reads the one before
    S* const next = act == stages && task.stages == 2 ? stages + kMlpForwardTile<Kind> : stages;
    if (task.stages == 2 && tile + gridDim.x < tiles) fetch(tile + gridDim.x, next);
    cp_async_commit();

    for (int l = 0; l < layers; ++l) {
      const bool last = l == layers - 1;
      const int n = width_of(l + 1);
      const S* w = weights + (task.resident ? l * kMlpWeights<Kind> : 0);
      if (!task.resident) {
        weights_to(l, weights);  // no thread has read the previous layer's since the last barrier
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();  // the layer's weights are there for all
      }
      Product product;
      multiply_resident(product, act, w, width_of(l));
      __syncthreads();  // all have read the layer's input, where its output goes

      const Activation& f = last ? call.output : call.hidden;
      const Parameters<S>& parameters = last ? task.output : task.hidden;
      S* z = last ? static_cast<S*>(pointers.z) : nullptr;
      int64_t z_stride = n;
      if (!last && task.save_pre_activations) {
        z = static_cast<S*>(pointers.hidden_outputs) + (layers - 1 + l) * shape.m * task.hidden_stride;
        z_stride = task.hidden_stride;
      }
      product.each_pair([&](int row, int col, float first, float second) {
        Pair<float> value{first + biases[l * width + col], second + biases[l * width + col + 1]};
        if (z != nullptr && row < rows && col < n)
          store_pair(z + (tile * tile_rows + row) * z_stride + col, value, col + 1 < n, !last || task.z_pairs);
        if (f.kind == ActivationKind::relu)
          value = {Relu::forward(VecF{value.first}, parameters).v, Relu::forward(VecF{value.second}, parameters).v};
        else if (f.kind != ActivationKind::identity)
          value = activate<S>(f.kind, parameters, value);
        if (col >= n) value.first = 0;
        if (col + 1 >= n) value.second = 0;
        store_pair(act + row * pitch + col, value, true, true);
      });
      __syncthreads();  // the layer's output is there for all

      S* const to = last ? static_cast<S*>(pointers.y) : static_cast<S*>(pointers.hidden_outputs);
      if (to == nullptr) continue;
      const int64_t stride = last ? n : task.hidden_stride;
      store_rows<threads, tile_rows, width, pitch>(to + ((last ? 0 : l * shape.m) + tile * tile_rows) * stride, stride,
                                                   rows, n, act, !last || task.y_vectors,
                                                   [](S(&)[kVector<S>], int, int) {});
    }
    act = next;
  }
  cp_async_wait<0>();
}

// ---- backward

template <class S>
struct MlpBackwardTask {
  MlpBackward call;
  MlpBackward::Pointers pointers;  // grad_y is the gradient of the last pre-activation, with the call's stride
  Parameters<S> hidden;
  int64_t hidden_stride;
  bool from_output;  // f' is computed from the output of a hidden layer, else from its pre-activation
  S* gradients;      // [m, hidden_stride]: the gradients of pre-activations that a layer passes to the layer before
  float* partial;    // [blocks][partial_size]: for each layer, the sums over a block's rows for W, then for b
  int64_t partial_size;
  int lowest;  // the first layer with a wanted gradient
  bool x_vectors, grad_y_vectors, grad_x_vectors;
  int stages;
};

template <class Kind>
constexpr int kMlpBackwardTile = Kind::InputGradient::kTileM * Kind::kPitch;

// The offset of a layer in the partial sums of a block.
__host__ __device__ inline int64_t mlp_partial_offset(const MlpShape& shape, int layer) {
  int64_t offset = 0;
  for (int l = 0; l < layer; ++l) offset += shape.widths[l + 1] * (shape.widths[l] + 1);
  return offset;
}

template <class Kind>
__global__ void __launch_bounds__(Kind::InputGradient::kThreads)
    mlp_backward_kernel(const __grid_constant__ MlpBackwardTask<typename Kind::S> task) {
  using S = typename Kind::S;
  using Input = typename Kind::InputGradient;
  using Weight = typename Kind::WeightGradient;
  constexpr int threads = Input::kThreads, width = Kind::kWidth, pitch = Kind::kPitch, tile_rows = Input::kTileM;
  static_assert(threads == Weight::kThreads && threads >= width && tile_rows % Weight::kTileK == 0);
  const MlpBackward& call = task.call;
  const MlpBackward::Pointers& pointers = task.pointers;
  const MlpShape& shape = call.shape;
  const int thread = static_cast<int>(threadIdx.x);
  const auto width_of = [&](int l) { return static_cast<int>(shape.widths[l]); };

  S* const weights = static_cast<S*>(shared_memory());
  S* const stages = weights + kMlpWeights<Kind>;
  const int64_t tiles = (shape.m + tile_rows - 1) / tile_rows;
  const S* const hidden = static_cast<const S*>(pointers.hidden_outputs);

  for (int l = shape.layers - 1; l >= task.lowest; --l) {
    const int n = width_of(l + 1), k = width_of(l);
    const bool last = l == shape.layers - 1, first = l == 0;
    const bool want_input = l > task.lowest || (first && pointers.grad_x != nullptr);
    const bool want_weight = pointers.grad_w[l] != nullptr, want_bias = pointers.grad_bias[l] != nullptr;
    // The input y of the layer, and z, the pre-activation of y if that was saved.
    const S* const y = first ? static_cast<const S*>(pointers.x) : hidden + (l - 1) * shape.m * task.hidden_stride;
    const int64_t y_stride = first ? call.x_row_stride : task.hidden_stride;
    const S* const z = y + (shape.layers - 1) * shape.m * task.hidden_stride;
    const S* const g = last ? static_cast<const S*>(pointers.grad_y) : task.gradients;
    const int64_t g_stride = last ? call.grad_y_row_stride : task.hidden_stride;

    const auto rows_of = [&](int64_t tile) {
      const int64_t left = shape.m - tile * tile_rows;
      return left < tile_rows ? static_cast<int>(left) : tile_rows;
    };
    const auto fetch = [&](int64_t tile, S* to) {
      const int64_t row = tile * tile_rows;
      const int rows = rows_of(tile);
      fetch_rows<threads, tile_rows, width, pitch>(to, g + row * g_stride, g_stride, rows, n,
                                                   !last || task.grad_y_vectors);
      fetch_rows<threads, tile_rows, width, pitch>(to + kMlpBackwardTile<Kind>, y + row * y_stride, y_stride, rows, k,
                                                   !first || task.x_vectors);
    };

    if (want_input) fetch_weights<threads, width, pitch, false>(weights, static_cast<const S*>(pointers.w[l]), n, k);
    Weight weight_gradient;
    float bias_gradient = 0;
    S* stage = stages;
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      if (task.stages == 1 || tile == blockIdx.x) {
        __syncthreads();  // nobody reads the tile before any more, and what the layer behind hands on is there
        fetch(tile, stage);
        cp_async_commit();
      }
      cp_async_wait<0>();
      __syncthreads();  // this tile is there for all, and nobody reads the one before
      S* const next = stage == stages && task.stages == 2 ? stages + 2 * kMlpBackwardTile<Kind> : stages;
      if (task.stages == 2 && tile + gridDim.x < tiles) fetch(tile + gridDim.x, next);
      cp_async_commit();

      S* const g_tile = stage;
      const S* const y_tile = stage + kMlpBackwardTile<Kind>;
      if (want_weight) multiply_resident(weight_gradient, g_tile, y_tile, tile_rows);
      if (want_bias && thread < n)
        for (int row = 0; row < tile_rows; ++row) bias_gradient += to_compute(g_tile[row * pitch + thread]);
      if (want_input) {
        Input input_gradient;
        multiply_resident(input_gradient, g_tile, weights, n);
        __syncthreads();  // all have read g, where the layer before's goes
        input_gradient.each_pair([&](int row, int col, float one, float two) {
          store_pair(g_tile + row * pitch + col, Pair<float>{one, two}, true, true);
        });
        __syncthreads();  // the tile of the layer before is there for all
        S* const to = first ? static_cast<S*>(pointers.grad_x) : task.gradients;
        const int64_t stride = first ? k : task.hidden_stride;
        const auto through_activation = [&](S(&values)[kVector<S>], int row, int col) {
          const ActivationKind kind = call.hidden.kind;
          if (first || kind == ActivationKind::identity) return;
          alignas(16) S saved[kVector<S>];
          load_unit(
              saved,
              task.from_output ? y_tile + row * pitch + col : z + (tile * tile_rows + row) * task.hidden_stride + col,
              kVector<S>, true);
#pragma unroll
          for (int i = 0; i < kVector<S>; i += 2) {
            Pair<float> value = load_pair(values + i);
            const Pair<float> factor = load_pair(saved + i);
            if (kind == ActivationKind::relu)
              value = {factor.first <= 0 ? 0.0f : value.first, factor.second <= 0 ? 0.0f : value.second};
            else
              value = differentiate<S>(kind, task.from_output, task.hidden, value, factor);
            store_pair(values + i, value, true, true);
          }
        };
        store_rows<threads, tile_rows, width, pitch>(to + tile * tile_rows * stride, stride, rows_of(tile), k, g_tile,
                                                     !first || task.grad_x_vectors, through_activation);
      }
      stage = next;
    }
    cp_async_wait<0>();

    float* const partial = task.partial + blockIdx.x * task.partial_size + mlp_partial_offset(shape, l);
    if (want_weight)
      weight_gradient.each_pair([&](int row, int col, float one, float two) {
        if (row < n && col < k) partial[row * k + col] = one;
        if (row < n && col + 1 < k) partial[row * k + col + 1] = two;
      });
    if (want_bias && thread < n) partial[n * k + thread] = bias_gradient;
  }
}

// Adds the partial sums of the blocks in order. One thread per element of the gradients of weights and biases.
template <class S>
__global__ void __launch_bounds__(kReduceThreads)
    mlp_reduce_kernel(const __grid_constant__ MlpBackwardTask<S> task, int64_t blocks) {
  int64_t index = static_cast<int64_t>(blockIdx.x) * kReduceThreads + threadIdx.x;
  const float* partial = task.partial + index;
  const MlpShape& shape = task.call.shape;
  int layer = 0;
  int64_t weights = 0;
  for (; layer < shape.layers; ++layer) {
    weights = shape.widths[layer + 1] * shape.widths[layer];
    const int64_t size = weights + shape.widths[layer + 1];
    if (index < size) break;
    index -= size;
  }
  if (layer == shape.layers) return;
  S* const gradient = static_cast<S*>(index < weights ? task.pointers.grad_w[layer] : task.pointers.grad_bias[layer]);
  if (gradient == nullptr) return;
  float sum = 0;
  for (int64_t block = 0; block < blocks; ++block) sum += partial[block * task.partial_size];
  to_storage(sum, gradient + (index < weights ? index : index - weights));
}

}  // namespace
}  // namespace fastops::cuda
