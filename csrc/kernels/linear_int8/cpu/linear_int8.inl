// Linear layers with int8 weights. The contract is csrc/kernels/linear_int8/linear_int8.h.
//
// All threads round x to 8 bits and pack it, a panel of kInt8Mr rows for each unit; then they compute blocks of y.
// Weights are packed once: by the caller, or at the beginning of a call.
#pragma once

#include "../../activation/cpu/rows.inl"
#include "../../common/cpu/common.inl"
#include "../../gemm/cpu/amx.inl"
#include "int8_products.inl"

// What a row of x was rounded with.
struct RowScale {
  float scale;
  int32_t zero;
};

// q of a row, in a panel: chunks of kInt8Chunk elements lie kInt8Mr * kInt8Chunk elements apart.
template <class T>
RowScale quantize_row(const T* x, int64_t k, Int8A* to) {
  using V = Vec<float>;
  constexpr int kVectors = kInt8Chunk / V::size;
  // In several chains: each of these operations takes four cycles.
  constexpr int kChains = 4;
  V low[kChains], high[kChains], finite[kChains];
  for (int c = 0; c < kChains; ++c) low[c] = high[c] = finite[c] = V::zero();
  const auto see = [&](V v, int c) {
    low[c] = min(low[c], v);
    high[c] = max(high[c], v);
    finite[c] = finite[c] + (v - v);  // 0, or NaN for infinities and NaN
  };
  int64_t p = 0;
  for (; p + kChains * V::size <= k; p += kChains * V::size) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) see(V::load(x + p + c * V::size), c);
  }
  for (; p + V::size <= k; p += V::size) see(V::load(x + p), 0);
  if (p < k) see(V::load(x + p, static_cast<int>(k - p)), 0);
  for (int c = 1; c < kChains; ++c) {
    low[0] = min(low[0], low[c]);
    high[0] = max(high[0], high[c]);
    finite[0] = finite[0] + finite[c];
  }
  alignas(64) float lows[V::size], highs[V::size];
  low[0].store(lows);
  high[0].store(highs);
  float least = 0, most = 0;
  for (int l = 0; l < V::size; ++l) {
    least = smaller(least, lows[l]);
    most = larger(most, highs[l]);
  }
  const float scale = larger(most / 255.0f - least / 255.0f, 0x1p-126f), inverse = 1.0f / scale;
  const V factor = V::set1(inverse), zero = round(V::set1(-least * inverse));
  zero.store(lows);
  const int32_t shift = static_cast<int32_t>(lows[0]);
  for (p = 0; p + kInt8Chunk <= k; p += kInt8Chunk, to += kInt8Mr * kInt8Chunk) {
    V v[kVectors];
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) v[i] = V::load(x + p + i * V::size) * factor;
    store_levels(v, shift, to);
  }
  if (p < k) {  // weights are zero for what lies behind
    V v[kVectors];
    for (int i = 0; i < kVectors; ++i) {
      const int count = static_cast<int>(smaller<int64_t>(larger<int64_t>(k - p - i * V::size, 0), V::size));
      v[i] = V::load(x + p + smaller<int64_t>(i * V::size, k - p), count) * factor;
    }
    store_levels(v, shift, to);
  }
  if (reduce_add(finite[0]) != 0) return {__builtin_nanf(""), 0};
  return {scale, shift};
}

// Rows [i, i + rows) of x as a panel, and what they were rounded with.
template <class T>
void quantize_panel(const Bound<LinearInt8Forward>& args, int64_t i, int rows, Int8A* to, RowScale* scales) {
  for (int r = 0; r < rows; ++r)
    scales[r] = quantize_row(static_cast<const T*>(args.x) + (i + r) * args.x_row_stride, args.k, to + r * kInt8Chunk);
}

// The register tile whose sums are complete and not yet in y. A matrix unit multiplies the next tile meanwhile.
template <class T>
class WaitingTile {
 public:
  explicit WaitingTile(const Bound<LinearInt8Forward>& args)
      : args_(args), relu_(rectifier(args.activation, nullptr)), f_(nullptr) {
    if (relu_ == kNoRectifier && args.activation.kind != ActivationKind::identity)
      f_ = row_forward<float>(args.activation.kind);
  }
  WaitingTile(const WaitingTile&) = delete;
  WaitingTile& operator=(const WaitingTile&) = delete;

  // y[i, j] is the first of rows x cols elements.
  void set(const RowScale* scales, const int32_t* w_sums, const int32_t* sums, int64_t i, int64_t j, int rows,
           int cols) {
    scales_ = scales;
    w_sums_ = w_sums;
    sums_ = sums;
    y_ = static_cast<T*>(args_.y) + i * args_.y_row_stride + j;
    done_ = 0;
    rows_ = rows;
    cols_ = cols;
    for (int v = 0; v < kVectors; ++v) {
      const int count = count_of(v);
      V::load(args_.w_scale + j + v * V::size, count).store(scale_ + v * V::size);
      const V bias =
          args_.bias != nullptr ? V::load(static_cast<const T*>(args_.bias) + j + v * V::size, count) : V::zero();
      bias.store(bias_ + v * V::size);
    }
  }

  // Rows before this one go to y.
  inline __attribute__((always_inline)) void finish(int end) {
    const bool whole = cols_ == kInt8Nr;
    for (const int last = smaller(end, rows_); done_ < last; ++done_) {
      const RowScale row = scales_[done_];
      const int32_t* const sums = sums_ + done_ * kInt8Nr;
      T* const y = y_ + done_ * args_.y_row_stride;
      alignas(64) float values[kInt8Nr];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        V value = without_zero(sums + v * V::size, w_sums_ + v * V::size, row.zero);
        value = value * (V::set1(row.scale) * V::load(scale_ + v * V::size)) + V::load(bias_ + v * V::size);
        if (relu_ != kNoRectifier) value = rectified(value, relu_);
        if (f_ != nullptr)
          value.store(values + v * V::size);
        else if (whole)
          value.store(y + v * V::size);
        else
          value.store(y + smaller(v * V::size, cols_), count_of(v));
      }
      if (f_ == nullptr) continue;
      f_(values, values, cols_, args_.activation);
      store_row<T>(values, y, cols_);
    }
  }
  void finish() { finish(rows_); }

 private:
  using V = Vec<float>;
  static constexpr int kVectors = kInt8Nr / V::size;
  int count_of(int v) const { return smaller(larger(cols_ - v * V::size, 0), V::size); }

  const Bound<LinearInt8Forward>& args_;
  const Rectifier relu_;
  RowForward<float> f_;
  const RowScale* scales_ = nullptr;
  const int32_t *w_sums_ = nullptr, *sums_ = nullptr;
  T* y_ = nullptr;
  int done_ = 0, rows_ = 0, cols_ = 0;
  alignas(64) float scale_[kInt8Nr], bias_[kInt8Nr];
};

// Block sizes. A panel of x and one of the weights, kInt8K of k each, take 2 x 32 KB with AMX: one is in L1, the other
// comes from L2, where the block of weights stays.
constexpr int64_t kInt8K = 1024, kInt8Columns = 256, kInt8Rows = 1024;
constexpr int64_t kInt8WaitingRows = 512;   // where sums wait for the next block of k
constexpr int64_t kInt8SmallestBlock = 64;  // where there are few
constexpr int64_t kInt8Packed = 16 << 20;   // bytes of x that are packed at a time

struct LinearInt8Plan {
  int threads;
  int64_t slab;    // rows of x that are packed at a time
  int64_t mb, nb;  // rows and columns of a block
  size_t scales_at, w_at, private_at, private_bytes;
};

struct PackedInt8 {
  int64_t n, k;
  Int8B* panels;

  PackedInt8(int64_t n, int64_t k, void* at) : n(n), k(round_up(k, kInt8Chunk)), panels(static_cast<Int8B*>(at)) {}
  int64_t count() const { return ceil_div(n, kInt8Nr); }
  Int8B* panel(int64_t q) const { return panels + q * kInt8Nr * k; }
  int32_t* sums(int64_t q) const { return reinterpret_cast<int32_t*>(panel(count())) + q * kInt8Nr; }
  size_t bytes() const {
    return static_cast<size_t>(count() * kInt8Nr) * (static_cast<size_t>(k) * sizeof(Int8B) + sizeof(int32_t));
  }
  void pack(const void* w, int64_t w_row_stride, int64_t features, int64_t q) const {
    const int cols = static_cast<int>(smaller<int64_t>(kInt8Nr, n - q * kInt8Nr));
    pack_int8_panel(static_cast<const int8_t*>(w) + q * kInt8Nr * w_row_stride, w_row_stride, cols, features, panel(q),
                    sums(q));
  }
};

template <class T>
void linear_int8_member(const Bound<LinearInt8Forward>& args, const LinearInt8Plan& plan, unsigned char* workspace,
                        Crew& crew) {
  const Int8Session session;
  const PackedInt8 w(args.n, args.k,
                     args.packed_w ? const_cast<void*>(args.w) : static_cast<void*>(workspace + plan.w_at));
  Int8A* const x = reinterpret_cast<Int8A*>(workspace);
  RowScale* const scales = reinterpret_cast<RowScale*>(workspace + plan.scales_at);
  int32_t* const own =
      reinterpret_cast<int32_t*>(workspace + plan.private_at + static_cast<size_t>(crew.thread) * plan.private_bytes);
  constexpr int64_t kTile = kInt8Mr * kInt8Nr;
  const int64_t panels = w.count(), wide = plan.nb / kInt8Nr;

  for (int64_t i0 = 0; i0 < args.m; i0 += plan.slab) {
    const int64_t rows = smaller(plan.slab, args.m - i0), x_panels = ceil_div(rows, kInt8Mr);
    const auto rows_of = [&](int64_t p) { return static_cast<int>(smaller<int64_t>(kInt8Mr, rows - p * kInt8Mr)); };
    const auto x_panel = [&](int64_t p) { return x + p * kInt8Mr * w.k; };
    const int64_t w_panels = i0 == 0 && !args.packed_w ? panels : 0;
    if (!crew.share(w_panels + x_panels, [&](int64_t unit) {
          const int64_t p = unit - w_panels;
          if (p < 0) return w.pack(args.w, args.w_row_stride, args.k, unit);
          quantize_panel<T>(args, i0 + p * kInt8Mr, rows_of(p), x_panel(p), scales + p * kInt8Mr);
        }))
      return;

    const int64_t high = plan.mb / kInt8Mr, blocks_down = ceil_div(x_panels, high);
    const bool stays = crew.share(blocks_down * ceil_div(panels, wide), [&](int64_t block) {
      const int64_t p0 = block % blocks_down * high, p1 = smaller(p0 + high, x_panels);
      const int64_t q0 = block / blocks_down * wide, q1 = smaller(q0 + wide, panels);
      // Sums wait in turns in two tiles, or each in its own for the next block of k.
      const bool waits = w.k > kInt8K;
      int64_t turn = 0;
      const auto cols_of = [&](int64_t q) { return static_cast<int>(smaller<int64_t>(kInt8Nr, args.n - q * kInt8Nr)); };
      WaitingTile<T> waiting(args);
      for (int64_t k0 = 0; k0 == 0 || k0 < w.k; k0 += kInt8K) {
        const int64_t length = smaller(kInt8K, w.k - k0);
        for (int64_t p = p0; p < p1; ++p) {
          const Int8A* const a = x_panel(p) + k0 * kInt8Mr;
          const Int8Rows shape(rows_of(p));
          for (int64_t q = q0; q < q1; ++q) {
            int32_t* const sums = own + (waits ? (p - p0) * wide + (q - q0) : turn++ % 2) * kTile;
            multiply_int8(shape, length, a, w.panel(q) + k0 * kInt8Nr, cols_of(q), k0 == 0, sums, waiting,
                          a + w.k * kInt8Mr + (q - q0) * length * kInt8Mr / 8);
            waiting.finish();
            if (k0 + length >= w.k)
              waiting.set(scales + p * kInt8Mr, w.sums(q), sums, i0 + p * kInt8Mr, q * kInt8Nr, rows_of(p), cols_of(q));
          }
        }
      }
      waiting.finish();
    });
    if (!stays) return;
  }
}

template <class T>
void plan_linear_int8(Plan<LinearInt8Forward>& plan) {
  const LinearInt8Forward& call = plan.call;
  const int64_t m = call.m, n = call.n;
  const PackedInt8 w(n, call.k, nullptr);
  LinearInt8Plan how{};
  const double work = 2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(w.k);
  how.threads = static_cast<int>(smaller(static_cast<double>(plan.target.threads), larger(1.0, work / kFlopPerThread)));
  const auto even = [](int64_t lanes, int64_t blocks, int unit) { return round_up(ceil_div(lanes, blocks), unit); };
  const int64_t row = larger<int64_t>(w.k, 1) * static_cast<int64_t>(sizeof(Int8A));
  how.slab = even(m, ceil_div(round_up(m, kInt8Mr) * row, kInt8Packed), kInt8Mr);
  int64_t down = ceil_div(how.slab, w.k > kInt8K ? kInt8WaitingRows : kInt8Rows), across = ceil_div(n, kInt8Columns);
  while (how.threads > 1 && down * across < 2 * how.threads) {
    const bool rows = how.slab / down >= n / across;
    if ((rows ? how.slab / down : n / across) < 2 * kInt8SmallestBlock) break;
    ++(rows ? down : across);
  }
  how.mb = even(how.slab, down, kInt8Mr);
  how.nb = even(n, across, kInt8Nr);

  size_t at = aligned(how.slab * row);
  how.scales_at = at;
  at += aligned(how.slab * static_cast<int64_t>(sizeof(RowScale)));
  how.w_at = at;
  if (!call.packed_w) at += aligned(static_cast<int64_t>(w.bytes()));
  how.private_at = at;
  const int64_t tiles = w.k > kInt8K ? how.mb / kInt8Mr * (how.nb / kInt8Nr) : 2;
  how.private_bytes = static_cast<size_t>(tiles * kInt8Mr * kInt8Nr) * sizeof(int32_t);
  at += static_cast<size_t>(how.threads) * how.private_bytes;

  decide(plan, {"gemm_int8", {kInt8Mr, kInt8Nr}}, at, how, [](auto& args, auto& how, auto* workspace, auto& team) {
    parallel(team, how.threads,
             [&](Crew& crew) { linear_int8_member<T>(args, how, static_cast<unsigned char*>(workspace), crew); });
  });
  if (!call.packed_w) return;
  plan.packed = w.bytes();
  plan.packer = [](const Plan<LinearInt8Forward>& plan, const void* w, void* to) {
    const PackedInt8 packed(plan.call.n, plan.call.k, to);
    for (int64_t q = 0; q < packed.count(); ++q) packed.pack(w, plan.call.w_row_stride, plan.call.k, q);
  };
}

void plan_call(Plan<LinearInt8Forward>& plan) {
  if (plan.call.m == 0 || plan.call.n == 0) return decide_nothing(plan);
  with_float_dtype(plan.call.dtype, [&](auto type) { plan_linear_int8<decltype(type)>(plan); });
}
