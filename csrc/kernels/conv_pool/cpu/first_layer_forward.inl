// A first layer with its max pool: a 3x3 convolution of few channels with stride 1, then 2x2 windows.
//
// The padded planes are split into even and odd columns, so that the 4 x 4 inputs of a vector of windows are 16
// contiguous vectors. From these the four convolutions of each window are computed in registers, for one output channel
// after the other. With one input channel, the 16 vectors stay in registers for all output channels. Backward
// multiplies the gradient, for each tap, by the one input that the position of the maximum selects: 9 multiply-adds per
// window, where the unpooled gradient would need 36.
#pragma once

#include "../../common/cpu/common.inl"
#include "../../conv/cpu/depthwise.inl"
#include "../../conv/cpu/depthwise_last.inl"
#include "../../conv/cpu/planes.inl"
#include "../../pool/cpu/taps.inl"

constexpr int64_t kPooledChannels = 4;

struct PooledPlan {
  PaddedRow row;
  int64_t rows, cols;   // of windows
  int64_t band, bands;  // rows of windows per band; bands per image
  int64_t plane, units;
  int threads;
  int64_t chunks, sums;       // of the weight gradient: chunks, and elements of the sums of a chunk
  int64_t per_thread, total;  // bytes
};

inline bool pools_first_layer(DType dtype, Layout layout, const ConvGeometry& g, const int64_t* pool) {
  if ((dtype != DType::f32 && dtype != DType::f64) || layout != Layout::channels_first) return false;
  if (!is_flat(g) || pool[0] != 1) return false;
  for (int d = 1; d < 3; ++d)
    if (g.kernel[d] != 3 || g.stride[d] != 1 || g.dilation[d] != 1 || pool[d] != 2 || g.out[d] < 2) return false;
  return g.groups == 1 && g.in_channels >= 1 && g.in_channels <= kPooledChannels && g.out_channels > 0;
}

template <class T>
PooledPlan plan_pooled(const ConvGeometry& g, bool weights, int threads) {
  constexpr int64_t S = Vec<T>::size, kT = sizeof(T);
  PooledPlan plan{};
  plan.rows = g.out[1] / 2;
  plan.cols = g.out[2] / 2;
  plan.row = padded_row<T>(g.in[2], g.padding[2], 2 * plan.cols + 2, 2);
  const int64_t fit = kBandBytes / (g.in_channels * plan.row.elements() * kT);
  const double work =
      72.0 * static_cast<double>(g.batch * plan.rows * plan.cols) * static_cast<double>(g.in_channels * g.out_channels);
  const auto useful = static_cast<int64_t>(
      smaller(static_cast<double>(threads), larger(1.0, work / static_cast<double>(kFlopPerThread))));
  plan.band = smaller(larger<int64_t>((fit - 2) / 2, 4), plan.rows);
  // Where there are fewer images than threads, all of these get a band. Sums of the weights' gradient must not depend
  // on the number of threads.
  if (!weights) plan.band = smaller(plan.band, ceil_div(plan.rows, ceil_div(useful, g.batch)));
  plan.bands = ceil_div(plan.rows, plan.band);
  plan.units = g.batch * plan.bands;
  plan.plane = (2 * plan.band + 2) * plan.row.elements();
  plan.chunks = weights ? smaller(plan.units, kLastChunks) : 0;
  plan.sums = g.out_channels * (9 * g.in_channels + 1) * S;
  plan.threads = static_cast<int>(smaller(useful, weights ? plan.chunks : plan.units));
  plan.per_thread = round_up(g.in_channels * plan.plane * kT, 64);
  plan.total = plan.per_thread * plan.threads + plan.chunks * plan.sums * kT;
  return plan;
}

// Copies the input rows of windows [p0, p1) of one image.
template <class T>
void copy_pooled_rows(const ConvGeometry& g, const PooledPlan& plan, const T* image, int64_t p0, int64_t p1, T* to) {
  for (int64_t c = 0; c < g.in_channels; ++c) {
    const Plane<T> x = {image + c * g.in[1] * g.in[2], g.in[2], nullptr, nullptr, {}};
    copy_rows(x, g.in[1], 2 * p0 - g.padding[1], 2 * (p1 - p0) + 2, plan.band == plan.rows, plan.row,
              to + c * plan.plane);
  }
}

// The 4 x 4 inputs of a vector of windows; lanes past `count` are zero.
template <class T>
inline void load_windows(const PaddedRow& row, const T* at, int count, Vec<T> (&x)[4][4]) {
  constexpr int S = Vec<T>::size;
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r)
#pragma GCC unroll 4
    for (int d = 0; d < 4; ++d) {
      const T* const p = at + r * row.elements() + row.at(d);
      x[r][d] = in_register(count == S ? Vec<T>::load(p) : Vec<T>::load(p, count));
    }
}

// acc[2 i + j] += the convolution at row i and column j of the windows.
template <class T>
inline void convolve_windows(const Vec<T> (&x)[4][4], const T* w, Vec<T> (&acc)[4]) {
#pragma GCC unroll 3
  for (int rh = 0; rh < 3; ++rh)
#pragma GCC unroll 3
    for (int rw = 0; rw < 3; ++rw) {
      const Vec<T> tap = Vec<T>::set1(w[rh * 3 + rw]);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) acc[i] = fma(x[rh + i / 2][rw + i % 2], tap, acc[i]);
    }
}

// The maximum of the four and its position. NaN is only handled if kNaN.
template <bool kNaN, class T>
inline Vec<T> maximum_of_four(const Vec<T> (&acc)[4], Taps<T>& at) {
  Vec<T> most = acc[0];
  at = Taps<T>::set1(0);
#pragma GCC unroll 3
  for (int i = 1; i < 4; ++i) {
    Mask<T> better = gt(acc[i], most);
    if (kNaN) better = better | unordered(acc[i], acc[i]);
    most = select(better, acc[i], most);
    at = select(better, Taps<T>::set1(i), at);
  }
  return most;
}

template <class T>
inline void pool_windows(const Vec<T> (&acc)[4], bool relu, T* y, uint8_t* indices, int count) {
  Taps<T> at;
  Vec<T> most;
  if (__builtin_expect((unordered(acc[0], acc[1]) | unordered(acc[2], acc[3])).bits() != 0, 0))
    most = maximum_of_four<true>(acc, at);
  else
    most = maximum_of_four<false>(acc, at);
  if (indices != nullptr) {
    if (relu) at = select(le(most, Vec<T>::zero()), Taps<T>::set1(kNoGradient), at);
    at.store(indices, count);
  }
  if (relu) most = max(Vec<T>::zero(), most);
  if (count == Vec<T>::size)
    most.store(y);
  else
    most.store(y, count);
}

// A row of windows of one image, for all output channels. x is its first input row in the copy.
template <bool kOne, class T>
void pool_first_row(const Bound<ConvPoolForward>& args, const PooledPlan& plan, const T* x, T* y, uint8_t* indices) {
  constexpr int64_t S = Vec<T>::size;
  const ConvGeometry& g = args.geometry;
  const T* const w = static_cast<const T*>(args.w);
  const T* const bias = static_cast<const T*>(args.bias);
  const bool relu = args.activation.kind == ActivationKind::relu;
  const int64_t channels = kOne ? 1 : g.in_channels, pooled = plan.rows * plan.cols;
  const bool inner = args.w_layout == Layout::channels_last;  // the taps of a channel are `channels` apart
  for (int64_t j = 0; j < plan.cols; j += S) {
    const int count = static_cast<int>(smaller(S, plan.cols - j));
    Vec<T> in[4][4];
    if (kOne) load_windows(plan.row, x + j, static_cast<int>(S), in);
    for (int64_t k = 0; k < g.out_channels; ++k) {
      const Vec<T> start = Vec<T>::set1(bias != nullptr ? bias[k] : T(0));
      Vec<T> acc[4] = {start, start, start, start};
      if (kOne) {
        convolve_windows(in, w + k * 9, acc);
      } else {
        for (int64_t c = 0; c < channels; ++c) {
          T taps[9];
          for (int t = 0; t < 9; ++t) taps[t] = w[k * 9 * channels + (inner ? t * channels + c : c * 9 + t)];
          load_windows(plan.row, x + c * plan.plane + j, static_cast<int>(S), in);
          convolve_windows(in, taps, acc);
        }
      }
      const int64_t at = k * pooled + j;
      pool_windows(acc, relu, y + at, indices != nullptr ? indices + at : nullptr, count);
    }
  }
}

template <class T>
void conv_pool_first(const Bound<ConvPoolForward>& args, void* workspace, const Team& team) {
  const ConvGeometry& g = args.geometry;
  const PooledPlan plan = plan_pooled<T>(g, false, args.threads);
  const int64_t image = g.in_channels * g.in[1] * g.in[2], pooled = g.out_channels * plan.rows * plan.cols;
  parallel(team, plan.threads, [&](Crew& crew) {
    T* const copy = reinterpret_cast<T*>(static_cast<unsigned char*>(workspace) + crew.thread * plan.per_thread);
    __builtin_memset(copy, 0, static_cast<size_t>(plan.per_thread));
    crew.each(plan.units, [&](int64_t unit) {
      const int64_t b = unit / plan.bands, p0 = unit % plan.bands * plan.band, p1 = smaller(p0 + plan.band, plan.rows);
      copy_pooled_rows(g, plan, static_cast<const T*>(args.x) + b * image, p0, p1, copy);
      for (int64_t p = p0; p < p1; ++p) {
        const T* const x = copy + 2 * (p - p0) * plan.row.elements();
        const int64_t at = b * pooled + p * plan.cols;
        T* const y = static_cast<T*>(args.y) + at;
        uint8_t* const indices = args.indices != nullptr ? args.indices + at : nullptr;
        if (g.in_channels == 1)
          pool_first_row<true>(args, plan, x, y, indices);
        else
          pool_first_row<false>(args, plan, x, y, indices);
      }
    });
  });
}

// sums[tap] += g times the input that the position of the maximum selects.
template <class T>
inline void add_windows(const Vec<T> (&x)[4][4], Vec<T> g, Mask<T> low, Mask<T> right, T* sums) {
  constexpr int S = Vec<T>::size;
#pragma GCC unroll 3
  for (int rw = 0; rw < 3; ++rw) {
    Vec<T> column[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) column[r] = select(right, x[r][rw + 1], x[r][rw]);
#pragma GCC unroll 3
    for (int rh = 0; rh < 3; ++rh) {
      T* const to = sums + (rh * 3 + rw) * S;
      fma(select(low, column[rh + 1], column[rh]), g, Vec<T>::load(to)).store(to);
    }
  }
}

// Adds a row of windows to the sums [output channel][9 taps per input channel, then the bias][lane].
template <bool kOne, class T>
void weight_first_row(const Bound<ConvPoolBackward>& args, const PooledPlan& plan, const T* x, const T* grad,
                      const uint8_t* indices, T* sums) {
  constexpr int64_t S = Vec<T>::size;
  const ConvGeometry& g = args.geometry;
  const int64_t channels = kOne ? 1 : g.in_channels, pooled = plan.rows * plan.cols;
  for (int64_t j = 0; j < plan.cols; j += S) {
    const int count = static_cast<int>(smaller(S, plan.cols - j));
    Vec<T> in[4][4];
    if (kOne) load_windows(plan.row, x + j, count, in);
    for (int64_t k = 0; k < g.out_channels; ++k) {
      const uint8_t* const at = indices + k * pooled + j;
      const Mask<T> upper_right = equal<T>(at, count, 1), lower_left = equal<T>(at, count, 2),
                    lower_right = equal<T>(at, count, 3), none = equal<T>(at, count, kNoGradient);
      const Vec<T> value = select(none, Vec<T>::zero(), Vec<T>::load(grad + k * pooled + j, count));
      const Mask<T> low = lower_left | lower_right, right = upper_right | lower_right;
      T* const to = sums + k * (9 * channels + 1) * S;
      if (kOne) {
        add_windows(in, value, low, right, to);
      } else {
        for (int64_t c = 0; c < channels; ++c) {
          load_windows(plan.row, x + c * plan.plane + j, count, in);
          add_windows(in, value, low, right, to + c * 9 * S);
        }
      }
      T* const bias = to + 9 * channels * S;
      (Vec<T>::load(bias) + value).store(bias);
    }
  }
}

template <class T>
void conv_pool_first_weight(const Bound<ConvPoolBackward>& args, void* workspace, const Team& team) {
  constexpr int64_t S = Vec<T>::size;
  const ConvGeometry& g = args.geometry;
  const PooledPlan plan = plan_pooled<T>(g, true, args.threads);
  const int64_t image = g.in_channels * g.in[1] * g.in[2], pooled = g.out_channels * plan.rows * plan.cols;
  unsigned char* const bytes = static_cast<unsigned char*>(workspace);
  T* const chunks = reinterpret_cast<T*>(bytes + plan.per_thread * plan.threads);
  parallel(team, plan.threads, [&](Crew& crew) {
    T* const copy = reinterpret_cast<T*>(bytes + crew.thread * plan.per_thread);
    __builtin_memset(copy, 0, static_cast<size_t>(plan.per_thread));
    crew.each(plan.chunks, [&](int64_t chunk) {
      T* const sums = chunks + chunk * plan.sums;
      __builtin_memset(sums, 0, static_cast<size_t>(plan.sums) * sizeof(T));
      const int64_t end = plan.units * (chunk + 1) / plan.chunks;
      for (int64_t unit = plan.units * chunk / plan.chunks; unit < end; ++unit) {
        const int64_t b = unit / plan.bands, p0 = unit % plan.bands * plan.band;
        const int64_t p1 = smaller(p0 + plan.band, plan.rows);
        copy_pooled_rows(g, plan, static_cast<const T*>(args.x) + b * image, p0, p1, copy);
        for (int64_t p = p0; p < p1; ++p) {
          const T* const x = copy + 2 * (p - p0) * plan.row.elements();
          const int64_t at = b * pooled + p * plan.cols;
          const T* const grad = static_cast<const T*>(args.grad_y) + at;
          if (g.in_channels == 1)
            weight_first_row<true>(args, plan, x, grad, args.indices + at, sums);
          else
            weight_first_row<false>(args, plan, x, grad, args.indices + at, sums);
        }
      }
    });
  });
  const int64_t taps = 9 * g.in_channels;
  const bool inner = args.w_layout == Layout::channels_last;
  for (int64_t i = 0; i < g.out_channels * (taps + 1); ++i) {
    Vec<T> sum = Vec<T>::load(chunks + i * S);
    for (int64_t chunk = 1; chunk < plan.chunks; ++chunk) sum = sum + Vec<T>::load(chunks + chunk * plan.sums + i * S);
    const int64_t k = i / (taps + 1), t = i % (taps + 1);
    if (t == taps) {
      if (args.grad_bias != nullptr) static_cast<T*>(args.grad_bias)[k] = reduce_add(sum);
    } else if (args.grad_w != nullptr) {
      static_cast<T*>(args.grad_w)[k * taps + (inner ? t % 9 * g.in_channels + t / 9 : t)] = reduce_add(sum);
    }
  }
}
