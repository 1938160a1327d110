// The gradient of an input with few channels, as of a first layer. It is also a transposed convolution to few channels.
//
// In the products of implicit_gemm.inl, one for every phase of the stride, C would have only as many rows as there are
// channels, and most of a register tile would be empty. Here channels and taps together are the rows of one product,
//   C[(channel, tap), position] = sum_o w[o, channel, tap] g[position, o]
// whose rows are then added to the rows of the image ("col2im"). The rows of the image are in a buffer in L1 or L2,
// split into the phases of the stride (planes.inl), so that neighbouring positions are contiguous.
//
// The output is divided into strips of rows, by the shape alone. The sum for an element of the image is in the order of
// the strips. After each strip the buffer moves on, and the rows that no later strip adds to are stored. A job is some
// strips of one image. It also computes the strips before it that add to its rows, which another job computes as well.
//
// Granite Rapids, one thread, 7x7, stride 2, 8 x 3 x 224 x 224 from 64 channels, ms, this and conv_gemm:
// float32 13.6 and 25.7, channels last 14.0 and 68.8; bfloat16 4.6 and 41.1, channels last 3.8 and 15.2.
#pragma once

#include "../../common/cpu/common.inl"
#include "../../gemm/cpu/gemm.inl"
#include "../../gemm/cpu/panels.inl"
#include "first_layer_forward.inl"
#include "implicit_gemm.inl"
#include "implicit_gemm_rows.inl"
#include "implicit_gemm_tile.inl"
#include "patches.inl"
#include "patches_pack.inl"
#include "planes.inl"

// The positions of a strip that are packed and multiplied at a time, and the largest panels, which stay in L2.
constexpr int64_t kScatterPositions = 512, kScatterPanelBytes = 256 << 10;
// The widest rows: with wider ones, there would be too few strips for several threads.
constexpr int64_t kScatterColumns = 1024;
// The least number of outputs: with fewer, adding to the image costs more than the sums. 8 outputs, 1 channel, 3x3,
// 28x28: conv_gemm takes 0.26 ms, this 0.32.
constexpr int64_t kScatterOutputs = 16;

struct ScatterPlan {
  int threads;
  int64_t features, kc, block;        // rows and k of the product; positions at a time
  int64_t rows, strips, band, bands;  // output rows per strip; strips per image and per job; jobs per image
  int64_t pitch, row, held, plane;    // of the buffer: elements of a phase and of a row; rows and elements of a plane
  int64_t w_panel, g_panel;           // elements between panels
  int64_t at_at, shared_end;
  int64_t buffer_at, line_at, private_bytes, total;  // bytes
};

// The products of a tier differ only in their panels.
template <class P, class T>
ScatterPlan plan_scatter(const ConvGeometry& g, int threads) {
  using Kind = Tile<P>;
  constexpr int64_t kElement = sizeof(typename Kind::B), kC = sizeof(Compute<T>), step = Kind::step;
  ScatterPlan plan{};
  plan.features = g.in_channels * g.kernel[1] * g.kernel[2];
  plan.kc = round_up(g.out_channels, Kind::k_align);
  const int64_t fit = kScatterPanelBytes / (plan.kc / step * kElement) / Kind::nr * Kind::nr;
  plan.block = larger<int64_t>(Kind::nr, smaller(kScatterPositions, fit));
  plan.rows = smaller(g.out[1], larger<int64_t>(1, plan.block / g.out[2]));
  plan.strips = ceil_div(g.out[1], plan.rows);
  const double flop =
      2.0 * static_cast<double>(g.batch * g.out[1] * g.out[2]) * static_cast<double>(plan.features * g.out_channels);
  plan.threads = conv_threads(flop, threads);
  const int64_t wanted = plan.threads == 1 ? 1 : ceil_div(2 * plan.threads, g.batch);
  plan.band = ceil_div(plan.strips, smaller(wanted, plan.strips));
  plan.bands = ceil_div(plan.strips, plan.band);

  const int64_t reach_h = g.dilation[1] * (g.kernel[1] - 1), reach_w = g.dilation[2] * (g.kernel[2] - 1);
  const int64_t width = larger((g.out[2] - 1) * g.stride[2] + reach_w + 1, g.in[2] + larger<int64_t>(g.padding[2], 0));
  plan.pitch = round_up(ceil_div(width, g.stride[2]), 16) + 16;
  plan.row = plan.pitch * g.stride[2];
  plan.held = plan.rows * g.stride[1] + reach_h;
  plan.plane = (plan.held + 1) * plan.row;  // the last row stays zero
  plan.w_panel = Kind::mr * plan.kc / step;
  plan.g_panel = Kind::nr * plan.kc / step;
  plan.at_at = round_up(ceil_div(plan.features, Kind::mr) * plan.w_panel * kElement, 64);
  plan.shared_end = plan.at_at + round_up(plan.features * 8, 64);
  plan.buffer_at = round_up(ceil_div(plan.block, Kind::nr) * plan.g_panel * kElement, 64);
  plan.line_at = plan.buffer_at + round_up(g.in_channels * plan.plane * kC, 64);
  plan.private_bytes = plan.line_at + round_up(g.in_channels * (plan.pitch + 64) * g.stride[2] * kC, 64);
  plan.total = plan.shared_end + plan.private_bytes * plan.threads;
  return plan;
}

template <class T>
bool conv_scatter_takes(const Bound<ConvBackwardInput>& args) {
  const ConvGeometry& g = args.geometry;
  const int64_t taps = g.kernel[1] * g.kernel[2];
  return is_flat(g) && g.groups == 1 && g.in_channels <= kFirstInputs && g.out[2] <= kScatterColumns &&
         g.out_channels >= kScatterOutputs && g.out_channels <= Tile<Compute<T>>::blocking.kc && taps > 1 &&
         taps <= kMaxTaps && g.stride[2] <= 4 && g.padding[1] >= 0 && g.padding[2] >= 0;
}

// Adds rows of a tile to the buffer: `count` sums of row i to to + at[i].
template <class C>
inline void add_scattered(const C* sums, int rows, int count, const int64_t* at, C* to) {
  constexpr int S = Vec<C>::size;
  if (count == 2 * S) {
    for (int r = 0; r < rows; ++r, sums += kMaxTile) {
      C* const p = to + at[r];
      (Vec<C>::load(p) + Vec<C>::load(sums)).store(p);
      (Vec<C>::load(p + S) + Vec<C>::load(sums + S)).store(p + S);
    }
    return;
  }
  for (int r = 0; r < rows; ++r, sums += kMaxTile)
    for (int i = 0; i < count; i += S) {
      const int width = smaller(count - i, S);
      C* const p = to + at[r] + i;
      (Vec<C>::load(p, width) + Vec<C>::load(sums + i, width)).store(p, width);
    }
}

// Interleaves the phases of a row of the buffer to a row of the image, from element `first` on.
template <class C>
inline void join_phases(const C* from, int64_t pitch, int64_t phases, int64_t first, int64_t count, C* to) {
  if (phases == 1) return copy_runs(from + first, 0, 1, count, to, 0);
  if (phases == 2) {
    if (first % 2 != 0) {
      *to++ = from[pitch + first / 2];
      ++first;
      --count;
    }
    return interleave_row(from + first / 2, from + pitch + first / 2, count, to);
  }
  for (int64_t i = 0; i < count; ++i) to[i] = from[(first + i) % phases * pitch + (first + i) / phases];
}

// Stores row q of the image, which is `row` in the planes of the buffer.
template <class T>
void store_scattered(const ConvGeometry& g, const ScatterPlan& plan, const ConvOutput<T>& out, int64_t image, int64_t q,
                     const Compute<T>* row, Compute<T>* line) {
  using C = Compute<T>;
  constexpr int S = Vec<C>::size;
  const int64_t width = g.in[2], channels = g.in_channels;
  const bool last = out.channel_stride == 1 && channels > 1;
  C* const joined = line + (last ? width * channels : 0);
  for (int64_t c = 0; c < channels; ++c, row += plan.plane) {
    join_phases(row, plan.pitch, g.stride[2], g.padding[2], width, joined);
    if (out.bias != nullptr || out.relu) {
      const Vec<C> bias = Vec<C>::set1(out.bias != nullptr ? widen_one(out.bias + c) : C{});
      for (int64_t i = 0; i < width; i += S) {
        const int count = static_cast<int>(smaller<int64_t>(width - i, S));
        Vec<C> v = Vec<C>::load(joined + i, count);
        if (out.bias != nullptr) v = v + bias;
        if (out.relu) v = rectified(v, out.relu);
        v.store(joined + i, count);
      }
    }
    if (last)
      for (int64_t i = 0; i < width; ++i) line[i * channels + c] = joined[i];
    else
      finish_run(out, joined, image * out.batch_stride + q * out.stride[1] + c * out.channel_stride, 1,
                 static_cast<int>(width));
  }
  if (last) finish_run(out, line, image * out.batch_stride + q * out.stride[1], 1, static_cast<int>(width * channels));
}

template <class P, class T>
void scatter_member(const Bound<ConvBackwardInput>& args, const ScatterPlan& plan, unsigned char* workspace,
                    Crew& crew) {
  using Kind = Tile<P>;
  using A = typename Kind::A;
  using B = typename Kind::B;
  using C = Compute<T>;
  constexpr int mr = Kind::mr, nr = Kind::nr, step = Kind::step;
  const typename Kind::Session session;
  const ConvGeometry& g = args.geometry;
  A* const w = reinterpret_cast<A*>(workspace);
  int64_t* const at = reinterpret_cast<int64_t*>(workspace + plan.at_at);
  unsigned char* const mine = workspace + plan.shared_end + plan.private_bytes * crew.thread;
  B* const panels = reinterpret_cast<B*>(mine);
  C* const buffer = reinterpret_cast<C*>(mine + plan.buffer_at);
  C* const line = reinterpret_cast<C*>(mine + plan.line_at);
  const ImageStrides strides(args.layout, g.in_channels, g.in);
  const ConvOutput<T> out = image_output<T>(args.grad_x, args.z, args.bias, args.epilogue, strides);
  Patches<T> gradient = gradient_patches<T>(g, args.layout, args.grad_y, args.activation, args.saved);
  set_plain(gradient);

  // The rows of the product are in the order of w in memory.
  const bool stays = crew.share(1, [&](int64_t) {
    pack<A, T, mr>(plain_source(static_cast<const T*>(args.w), 1, plan.features), 0, plan.features, 0, g.out_channels,
                   w, plan.w_panel, nullptr);
    const bool inner = args.w_layout == Layout::channels_last;
    const int64_t taps = g.kernel[1] * g.kernel[2];
    for (int64_t f = 0; f < plan.features; ++f) {
      const int64_t c = inner ? f % g.in_channels : f / taps, t = inner ? f / g.in_channels : f % taps;
      const int64_t down = t / g.kernel[2] * g.dilation[1], right = t % g.kernel[2] * g.dilation[2];
      at[f] = c * plan.plane + down * plan.row + right % g.stride[2] * plan.pitch + right / g.stride[2];
    }
  });
  if (!stays) return;
  crew.share(g.batch * plan.bands, [&](int64_t job) {
    const int64_t image = job / plan.bands, s0 = job % plan.bands * plan.band;
    const int64_t s1 = smaller(s0 + plan.band, plan.strips);
    const int64_t strip_rows = plan.rows * g.stride[1];  // rows of the image that no later strip adds to
    const int64_t shared = plan.held - strip_rows;       // rows that later strips add to as well
    const int64_t before = smaller(s0, ceil_div(shared, strip_rows));
    const int64_t own_begin = s0 * strip_rows;
    const int64_t own_end = s1 == plan.strips ? g.padding[1] + g.in[1] : s1 * strip_rows;
    zero_run(g.in_channels * plan.plane, buffer);
    for (int64_t strip = s0 - before; strip < s1; ++strip) {
      const int64_t base = strip * strip_rows;  // the first row of the buffer, as a row of the padded image
      if (strip > s0 - before)
        for (int64_t c = 0; c < g.in_channels; ++c) {
          C* const plane = buffer + c * plan.plane;
          for (int64_t row = 0; row < shared; ++row)
            copy_runs(plane + (row + strip_rows) * plan.row, 0, 1, plan.row, plane + row * plan.row, 0);
          zero_run(strip_rows * plan.row, plane + shared * plan.row);
        }
      const int64_t p0 = strip * plan.rows, positions = smaller(plan.rows, g.out[1] - p0) * g.out[2];
      for (int64_t n0 = 0; n0 < positions; n0 += plan.block) {
        const int64_t n1 = smaller(n0 + plan.block, positions);
        pack_patches<B, T, nr>(gradient, true, (image * g.out[1] + p0) * g.out[2] + n0, n1 - n0, 0, g.out_channels,
                               panels, plan.g_panel, nullptr);
        for (int64_t n = n0; n < n1; n += nr) {
          const int width = static_cast<int>(smaller<int64_t>(nr, n1 - n));
          for (int64_t m = 0; m < plan.features; m += mr) {
            const int height = static_cast<int>(smaller<int64_t>(mr, plan.features - m));
            alignas(64) C sums[kMaxTile * kMaxTile];
            product_buffer(P{}, ceil_div(g.out_channels, step), w + m / mr * plan.w_panel,
                           panels + (n - n0) / nr * plan.g_panel, height, width, static_cast<const C*>(nullptr), 0,
                           sums);
            for_stored(n, n + width, g.out[2], g.out[2], 0, g.out[2], [&](int64_t first, int64_t position, int count) {
              C* const to = buffer + position / g.out[2] * g.stride[1] * plan.row + position % g.out[2];
              add_scattered(sums + first, height, count, at + m, to);
            });
          }
        }
      }
      const int64_t end = strip + 1 == plan.strips ? own_end : smaller(own_end, base + strip_rows);
      for (int64_t u = larger(larger(base, own_begin), g.padding[1]); u < end; ++u)
        store_scattered(g, plan, out, image, u - g.padding[1], buffer + smaller(u - base, plan.held) * plan.row, line);
    }
  });
}

template <class T>
void plan_scatter(Plan<ConvBackwardInput>& plan, const Bound<ConvBackwardInput>& args) {
  with_panel<T>(args.bf16_multiply, conv_work(args.geometry), [&](auto panel) {
    using P = decltype(panel);
    const ScatterPlan product = plan_scatter<P, T>(args.geometry, plan.target.threads);
    decide(plan, conv_product_name<P>("conv_scatter", "conv_scatter_bf16"), static_cast<size_t>(product.total), product,
           [](auto& args, auto& product, auto* workspace, auto& team) {
             unsigned char* const bytes = static_cast<unsigned char*>(workspace);
             parallel(team, product.threads, [&](Crew& crew) { scatter_member<P, T>(args, product, bytes, crew); });
           });
  });
}
