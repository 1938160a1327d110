// The gradient of w by AMX, from a copy of image rows (implicit_gemm_rows.inl). The copy is channels last for images of
// either layout.
//
//   C[o, (tap, channel)] = sum_n g[n, o] copy[n's pixel for the tap, channel]
//
// A block is some output rows of one slice. For every block, g is packed as A. Panels of B are interleaved from pairs
// of pixels of the copy, without tests for the border of the image, and used while they are in L1. A job adds some
// blocks, for one part of the channels, to a copy of C, whose tiles are loaded and stored in place.
#pragma once

#include "../../common/cpu/common.inl"
#include "../../gemm/cpu/gemm.inl"
#include "implicit_gemm.inl"
#include "implicit_gemm_amx.inl"
#include "implicit_gemm_rows.inl"
#include "patches.inl"
#include "patches_pack.inl"
#include "weight_gemm.inl"

#if defined(FASTOPS_HAS_AMX)

// The most positions of a block, and the widest row. A panel of A and a panel of B together stay in L1. Granite Rapids,
// 64 channels of 56x56 to 64, positions and ms: 448 2.4, 256 2.06, 168 1.94, 112 2.05.
constexpr int64_t kPixelBlock = 200, kPixelColumns = 512;
// The largest part of C in bytes. It stays in L2 beside the operands.
constexpr int64_t kPixelSumBytes = 640 << 10;
// The least number of channels: with fewer, too much of a panel would be empty.
constexpr int64_t kPixelChannels = 16;

struct WeightPixelsPlan {
  bool taken;
  RowsPlan rows;
  int64_t channels, parts;    // channels per part; parts per group
  int64_t lanes;              // columns of C per tap
  int64_t features, outputs;  // columns and rows of C, rounded up to whole tiles
  int64_t blocks, chunks;     // blocks of output rows; copies of C
  int64_t a_panel;
  int threads;
  size_t private_at, copy_bytes, a_bytes, offset_bytes, private_bytes, bias_at, slots_at, total;
};

inline WeightPixelsPlan plan_weight_pixels(const ConvWeightProduct<bf16_t>& g, int threads) {
  const Patches<bf16_t>& s = g.image;
  WeightPixelsPlan plan{};
  if (g.grad_w == nullptr || s.plain || g.features * g.outputs * g.positions == 0 || s.tap_count > kMaxTaps ||
      s.channels < kPixelChannels || s.grid[2] > kPixelColumns)
    return plan;
  plan.outputs = round_up(g.outputs, 32);
  const int64_t most = kPixelSumBytes / (4 * plan.outputs * s.tap_count) / 32 * 32;
  if (most == 0) return plan;
  plan.parts = ceil_div(s.channels, most);
  plan.channels = plan.parts == 1 ? s.channels : round_up(ceil_div(s.channels, plan.parts), 32);
  plan.parts = ceil_div(s.channels, plan.channels);
  plan.lanes = round_up(plan.channels, 16);
  plan.features = round_up(s.tap_count * plan.lanes, 32);
  const int64_t inner = s.channels_inner || plan.lanes == 16 ? plan.lanes : round_up(plan.channels, 32);
  RowsPlan& rows = plan.rows;
  rows.pixel = inner;
  // Blocks of about the same number of rows.
  const int64_t most_rows = smaller(s.grid[1], larger<int64_t>(1, kPixelBlock / s.grid[2]));
  const int64_t height = ceil_div(s.grid[1], ceil_div(s.grid[1], most_rows));
  if (!plan_copy(s, 2, inner, height, height * s.grid[2], &rows)) return plan;
  plan.blocks = g.positions / (s.grid[1] * s.grid[2]) * rows.row_blocks;
  plan.chunks = smaller(plan.blocks, ceil_div(kWeightJobs, g.groups * plan.parts));
  plan.threads = conv_threads(
      2.0 * static_cast<double>(g.groups * g.outputs * g.features) * static_cast<double>(g.positions), threads);
  const int64_t k = round_up(rows.rows * rows.cols, kTileK);
  plan.a_panel = 32 * k / 2;
  plan.private_at = 0;
  plan.copy_bytes = aligned(rows.bytes + 128);  // the last pixel is stored and loaded as whole vectors
  plan.a_bytes = aligned(plan.outputs / 32 * plan.a_panel * 4);
  plan.offset_bytes = aligned(k * 4);
  plan.private_bytes = plan.copy_bytes + plan.a_bytes + plan.offset_bytes + aligned(32 * k * 2);
  plan.bias_at = plan.private_at + plan.private_bytes * static_cast<size_t>(plan.threads);
  plan.slots_at = plan.bias_at + (g.grad_bias != nullptr ? aligned(plan.chunks * g.groups * g.outputs * 4) : 0);
  plan.total = plan.slots_at + aligned(plan.chunks * g.groups * plan.parts * plan.outputs * plan.features * 4);
  plan.taken = true;
  return plan;
}

// 16 lanes of a panel, from the pixels at from + offsets[p], p < k.
inline void interleave_half(const bf16_t* from, const int32_t* offsets, int64_t k, amx_b* to) {
  const auto load = [](const bf16_t* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  };
  int64_t p = 0;
#pragma GCC unroll 4
  for (; p + 2 <= k; p += 2, to += 32) {
    const __m512i low = load(from + offsets[p]), high = load(from + offsets[p + 1]);
    _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  for (; p < round_up(k, kTileK); p += 2, to += 32)
    _mm512_storeu_si512(to, p < k ? load(from + offsets[p]) : _mm512_setzero_si512());
}

// All 32 lanes of a panel, from contiguous channels. Their order is the one that a single instruction produces: of
// every 8 channels, the first 4 are in the left half.
inline void interleave_pixels(const bf16_t* from, const int32_t* offsets, int64_t k, amx_b* to) {
  int64_t p = 0;
#pragma GCC unroll 4
  for (; p + 2 <= k; p += 2, to += 32) {
    const __m512i low = _mm512_loadu_si512(from + offsets[p]), high = _mm512_loadu_si512(from + offsets[p + 1]);
    _mm512_storeu_si512(to, _mm512_unpacklo_epi16(low, high));
    _mm512_storeu_si512(to + 16, _mm512_unpackhi_epi16(low, high));
  }
  for (; p < round_up(k, kTileK); p += 2, to += 32) {
    const __m512i low = p < k ? _mm512_loadu_si512(from + offsets[p]) : _mm512_setzero_si512();
    _mm512_storeu_si512(to, _mm512_unpacklo_epi16(low, _mm512_setzero_si512()));
    _mm512_storeu_si512(to + 16, _mm512_unpackhi_epi16(low, _mm512_setzero_si512()));
  }
}

// Channels [16 half, 16 half + 16) of the 32 at p, in their original order.
inline Vec<float> ordered_lanes(const float* p, int64_t half) {
  const __m512i lower = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i order = _mm512_add_epi32(lower, _mm512_set1_epi32(static_cast<int>(8 * half)));
  return {_mm512_permutex2var_ps(_mm512_loadu_ps(p), order, _mm512_loadu_ps(p + 16))};
}

// c = A B if `first`, else c += A B, for a tile of 32 x 32.
__attribute__((noinline)) void accumulate_tiles(int64_t chunks, const amx_a* a, const amx_b* b, bool first, float* c,
                                                int64_t c_rs) {
  constexpr int64_t kAStride = 64, kBStride = 128;
  const int64_t stride = 4 * c_rs;
  memory_fence_for_compiler();
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, c, stride);
    _tile_loadd(1, c + 16, stride);
    _tile_loadd(2, c + 16 * c_rs, stride);
    _tile_loadd(3, c + 16 * c_rs + 16, stride);
  }
  for (int64_t p = 0; p < chunks; ++p, a += 32 * kTilePairs, b += 32 * kTilePairs) {
    _tile_loadd(4, a, kAStride);
    _tile_loadd(6, b, kBStride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + 16, kBStride);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + 16 * kTilePairs, kAStride);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, stride);
  _tile_stored(1, c + 16, stride);
  _tile_stored(2, c + 16 * c_rs, stride);
  _tile_stored(3, c + 16 * c_rs + 16, stride);
  memory_fence_for_compiler();
}

// Adds one block of output rows to c. s has the channels of the part, `gradient` those of the group.
inline void add_weight_pixels(const Patches<bf16_t>& s, const Patches<bf16_t>& gradient, int64_t outputs,
                              const WeightPixelsPlan& plan, int64_t block, bool first, unsigned char* mine, float* c,
                              float* sums) {
  const RowsPlan& rows = plan.rows;
  bf16_t* const copy = reinterpret_cast<bf16_t*>(mine);
  amx_a* const a = reinterpret_cast<amx_a*>(mine + plan.copy_bytes);
  int32_t* const offsets = reinterpret_cast<int32_t*>(mine + plan.copy_bytes + plan.a_bytes);
  amx_b* const b = reinterpret_cast<amx_b*>(mine + plan.copy_bytes + plan.a_bytes + plan.offset_bytes);
  const int64_t slice = block / rows.row_blocks, image = slice / s.grid[0];
  const int64_t p[3] = {slice % s.grid[0], block % rows.row_blocks * rows.rows, 0};
  const int64_t height = smaller(rows.rows, s.grid[1] - p[1]), width = s.grid[2], k = height * width;
  if (s.channels_inner)
    copy_image_rows(s, rows, image, p, copy);
  else
    copy_transposed(s, rows, image, p, copy);
  for (int64_t row = 0, n = 0; row < height; ++row)
    for (int64_t col = 0; col < width; ++col, ++n)
      offsets[n] = static_cast<int32_t>(row * s.step[1] * rows.row + col * s.step[2] * rows.col);

  const int64_t within = (p[0] * s.grid[1] + p[1]) * width;
  const Source<bf16_t> source =
      gradient.channels_inner
          ? plain_patches(gradient, false, gradient.stride[2], 1, image * gradient.batch_stride)
          : plain_patches(gradient, false, 1, gradient.channel_stride, image * gradient.batch_stride);
  pack<amx_a, bf16_t, 32>(source, 0, outputs, within, k, a, plan.a_panel, sums);

  // The source of a panel or of half a panel: channels from `channel` on of the tap at the cursor.
  TapCursor tap(s.taps, 0);
  int64_t channel = 0;
  const auto next = [&](int64_t lanes) {
    const bf16_t* const from = copy + channel + tap.i[0] * rows.slab +
                               (s.taps[1].offset + tap.i[1] * s.taps[1].offset_step - rows.low[1]) * rows.row +
                               (s.taps[2].offset + tap.i[2] * s.taps[2].offset_step - rows.low[2]) * rows.col;
    if ((channel += lanes) < plan.lanes) return from;
    channel = 0;
    tap.advance(s.taps);
    return from;
  };
  for (int64_t f = 0; f < plan.features; f += 32) {
    if (plan.lanes % 32 == 0) {
      interleave_pixels(next(32), offsets, k, b);
    } else {
      interleave_half(next(16), offsets, k, b);
      interleave_half(next(16), offsets, k,
                      b + 16);  // after the last tap this is the first one again; its sums are not used
    }
    for (int64_t o = 0; o < plan.outputs; o += 32)
      accumulate_tiles(ceil_div(k, kTileK), a + o / 32 * plan.a_panel, b, first, c + o * plan.features + f,
                       plan.features);
  }
}

// Adds the copies of row `output` of C and stores the result.
inline void reduce_pixels(const ConvWeightProduct<bf16_t>& g, const WeightPixelsPlan& plan, Layout w_layout,
                          const float* slots, int64_t group, int64_t output) {
  const int64_t taps = g.image.tap_count, channels = g.image.channels, c_size = plan.outputs * plan.features;
  const int64_t slot = g.groups * plan.parts * c_size;
  bf16_t* const to = g.grad_w + (group * g.outputs + output) * g.features;
  for (int64_t part = 0; part < plan.parts; ++part) {
    const float* const from = slots + (group * plan.parts + part) * c_size + output * plan.features;
    const int64_t c0 = part * plan.channels, c1 = smaller(c0 + plan.channels, channels);
    for (int64_t c = c0; c < c1; c += 16)
      for (int64_t t0 = 0; t0 < taps; t0 += 16) {
        const int lanes = static_cast<int>(smaller<int64_t>(16, c1 - c));
        const int count = static_cast<int>(smaller<int64_t>(16, taps - t0));
        Vec<float> r[16];
        for (int t = 0; t < 16; ++t) {
          r[t] = Vec<float>::zero();
          if (t >= count) continue;
          const auto load = [&](int64_t chunk) {
            const float* const at = from + chunk * slot + (t0 + t) * plan.lanes;
            return plan.lanes % 32 != 0 ? Vec<float>::load(at + (c - c0))
                                        : ordered_lanes(at + (c - c0) / 32 * 32, (c - c0) / 16 % 2);
          };
          r[t] = load(0);
          for (int64_t chunk = 1; chunk < plan.chunks; ++chunk) r[t] = r[t] + load(chunk);
        }
        if (w_layout == Layout::channels_last) {
          for (int t = 0; t < count; ++t) r[t].store(to + (t0 + t) * channels + c, lanes);
          continue;
        }
        transpose(r);
        for (int i = 0; i < lanes; ++i) r[i].store(to + (c + i) * taps + t0, count);
      }
  }
}

inline void conv_weight_pixels(const ConvWeightProduct<bf16_t>& g, const WeightPixelsPlan& plan, Layout w_layout,
                               void* workspace, const Team& team) {
  unsigned char* const bytes = static_cast<unsigned char*>(workspace);
  float* const bias_slots = reinterpret_cast<float*>(bytes + plan.bias_at);
  float* const slots = reinterpret_cast<float*>(bytes + plan.slots_at);
  parallel(team, plan.threads, [&](Crew& crew) {
    const AmxSession session;
    unsigned char* const mine = bytes + plan.private_at + static_cast<size_t>(crew.thread) * plan.private_bytes;
    // Rows of A past the last output are zero.
    __builtin_memset(mine + plan.copy_bytes, 0, plan.a_bytes);
    const bool stays = crew.share(plan.chunks * g.groups * plan.parts, [&](int64_t job) {
      const int64_t part = job % plan.parts, group = job / plan.parts % g.groups, chunk = job / plan.parts / g.groups;
      const Patches<bf16_t> gradient = of_group(g.gradient, group);
      Patches<bf16_t> image = of_group(g.image, group);
      image.x += part * plan.channels * image.channel_stride;
      image.channels = smaller(plan.channels, image.channels - part * plan.channels);
      float* sums = nullptr;
      if (g.grad_bias != nullptr && part == 0) {
        sums = bias_slots + (chunk * g.groups + group) * g.outputs;
        for (int64_t i = 0; i < g.outputs; ++i) sums[i] = 0;
      }
      float* const c = slots + ((chunk * g.groups + group) * plan.parts + part) * plan.outputs * plan.features;
      const int64_t begin = plan.blocks * chunk / plan.chunks, end = plan.blocks * (chunk + 1) / plan.chunks;
      for (int64_t block = begin; block < end; ++block)
        add_weight_pixels(image, gradient, g.outputs, plan, block, block == begin, mine, c, sums);
    });
    if (!stays) return;
    crew.share(g.groups * g.outputs + 1, [&](int64_t row) {
      if (row < g.groups * g.outputs)
        reduce_pixels(g, plan, w_layout, slots, row / g.outputs, row % g.outputs);
      else if (g.grad_bias != nullptr)
        reduce_bias(g, bias_slots, plan.chunks);
    });
  });
}
#endif
