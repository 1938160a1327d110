// Products by AMX in blocks of C[i, j]. A thread packs the panels of B of a block, of as much of k as takes half of L2,
// and keeps them. Then each panel of A passes by: in L1 for one block of k, multiplied by the panels of B, which are
// loaded past L1 so that A stays there, while the next panel of A is prefetched from L3. The sums of a row of tiles are
// finished once k is done. Where B takes more than its half of L2, sums of the whole block wait for the rest of k.
//
// Measured on Emerald Rapids (2 MB L2), one thread, GF/s, registers alone 2700 to 2900, 1024^3 with packed operands in
// a program of its own: C of 1024 x 256 added to for every 256 k 1400 to 1520; C of a row of tiles, 512 columns, 512 k
// of A in L1, 1510 to 1590; B past L1 1860 to 2000.
//
// Of three parts, the sum of each block of k begins at zero and is added to those before it: a sum that went on in the
// unit would lose more with every block (rms, of 8192 uniform numbers 3.7e-7 for 1.1e-7). It takes 8% of the time.
//
// All threads pack A, 1024 rows at a time; B is packed by whoever computes a block, and A where there is one block
// only. Every element of C is a sum over blocks of k in order, whose length depends on the type alone: the result does
// not depend on the number of threads.
#pragma once

#include "bf16_parts.inl"
#include "product.inl"

// Of the products that can come in blocks, and of those that come in no other way: packing.
template <class P>
struct Blocks {
  static constexpr bool some = false, all = false;
};

#if defined(FASTOPS_HAS_AMX)

template <int n>
struct Blocks<bf16_parts<n>> {
  static constexpr bool some = true, all = true;
  static constexpr KernelName kernel = {n == 1   ? "gemm_bf16x1"
                                        : n == 2 ? "gemm_bf16x2"
                                                 : "gemm_bf16x3",
                                        {kLanes, kLanes}};
  static constexpr int parts = n;
  static constexpr int64_t kc = n == 1 ? 512 : n == 2 ? 192 : 128;  // a panel of A takes half of L1 and more

  static Range pack(bool of_a, const Source<float>& s, int64_t lane, int lanes, int64_t k0, int64_t k,
                    unsigned char* to, float* sums) {
    return of_a ? pack_block<n, true>(s, lane, lanes, k0, k, to, sums)
                : pack_block<n, false>(s, lane, lanes, k0, k, to, sums);
  }
};
template <class P>
inline void pack_panel(const Source<bf16_t>& s, int64_t lane, int lanes, int64_t k0, int64_t k, unsigned char* to,
                       float* sums) {
  pack<P, bf16_t, kLanes>(s, lane, lanes, k0, k, reinterpret_cast<P*>(to), 0, sums);
}
template <>
struct Blocks<bf16_amx> {
  static constexpr bool some = true, all = false;
  static constexpr int parts = 1;
  static constexpr int64_t kc = 512;

  static Range pack(bool of_a, const Source<bf16_t>& s, int64_t lane, int lanes, int64_t k0, int64_t k,
                    unsigned char* to, float* sums) {
    if (of_a)
      pack_panel<amx_a>(s, lane, lanes, k0, k, to, sums);
    else
      pack_panel<amx_b>(s, lane, lanes, k0, k, to, sums);
    return {};
  }
};

// A block of C has at most this many rows and columns.
constexpr int64_t kBlockRows = 1024, kBlockColumns = 256;
constexpr int64_t kWideColumns = 512, kWideK = 1024;  // of one part, where k is short
// Packed panels of B, of as many blocks of k as there is room for, take this much of L2.
constexpr int64_t kGroupBytes = 1 << 20;
constexpr int64_t kSmallestBlock = 64;  // where there are few
constexpr int64_t kFewRows = 128;       // of A, which several threads may pack for themselves
// Packed rows of A take at most this many bytes, where sums can wait in y.
constexpr int64_t kMostPacked = 32 << 20;

// The blocks of k of a product, in order; none has a k of two images.
struct DepthBlocks {
  int64_t k, kc, images;

  int64_t of_image() const { return ceil_div(k, kc); }
  int64_t count() const { return images * of_image(); }
  int64_t image(int64_t kb) const { return kb / of_image(); }
  int64_t first(int64_t kb) const { return kb % of_image() * kc; }  // k in its image
  int64_t length(int64_t kb) const { return smaller(kc, k - first(kb)); }
  int64_t chunks(int64_t kb) const { return ceil_div(length(kb), kTileK); }
  int64_t most_chunks() const { return ceil_div(smaller(kc, k), kTileK); }
  int64_t chunks_before(int64_t kb) const { return image(kb) * ceil_div(k, kTileK) + first(kb) / kTileK; }
};

inline int64_t packed_bytes(int64_t panels, int64_t chunks, int parts) { return panels * chunks * parts * kPartBytes; }
inline int64_t range_bytes(int64_t panels, int64_t blocks) {
  return round_up(panels * blocks * static_cast<int64_t>(sizeof(Range)), 64);
}

// Packed panels of an operand, from the block of k `first` on. The panels of one block of k follow each other.
struct PackedBlocks {
  unsigned char* data;
  Range* ranges;
  int64_t panels, first, chunk_bytes;
  DepthBlocks depth;

  unsigned char* block(int64_t kb, int64_t panel) const {
    const int64_t before = depth.chunks_before(kb) - depth.chunks_before(first);
    return data + (before * panels + panel * depth.chunks(kb)) * chunk_bytes;
  }
  Range& range(int64_t kb, int64_t panel) const { return ranges[(kb - first) * panels + panel]; }
};

// Bytes of a block of sums, or of one row of its tiles where no sums wait, and of another row of tiles.
inline int64_t sums_bytes(const GemmPlan& plan) {
  return ((plan.group < plan.ks ? plan.mb : kLanes) + kLanes) * plan.nb * 4;
}

// Fills a plan, which is `blocked` then.
template <class P, class T>
GemmPlan plan_blocks(const Gemm<T>& g, int threads) {
  using Kind = Blocks<P>;
  constexpr int parts = Kind::parts;
  GemmPlan plan{};
  plan.blocked = true;
  plan.b_packed = g.b_packed != nullptr;
  plan.kc = Kind::kc;
  const double flop = 2.0 * static_cast<double>(g.m) * static_cast<double>(g.n) * static_cast<double>(g.k) *
                      static_cast<double>(g.images * g.k_images);
  plan.threads = static_cast<int>(smaller(static_cast<double>(threads), larger(1.0, flop / kFlopPerThread)));

  const DepthBlocks depth = {g.k, plan.kc, g.k_images};
  const int64_t m = round_up(g.m, kLanes), n = g.images * round_up(g.n, kLanes);
  const auto even = [](int64_t lanes, int64_t blocks) { return round_up(ceil_div(lanes, blocks), kLanes); };
  plan.ms = even(m, ceil_div(m, kBlockRows));
  plan.ks = depth.count();
  // Where nothing but A is packed, each thread packs its own rows: what one core has just written is slow to read for
  // another. Emerald Rapids, two threads, 64 x 128 x 784: 40 to 44 us where nothing disturbs, 143 with shared rows; by
  // multiply-adds 50 to 59.
  const bool alone = plan.b_packed && (n <= kBlockColumns || m <= kFewRows);
  const auto shared = [&] { return packed_bytes(plan.ms / kLanes, plan.ks * depth.most_chunks(), parts); };
  while (!alone && same_type<T, Compute<T>> && plan.ks > 1 && shared() > kMostPacked) plan.ks = ceil_div(plan.ks, 2);

  const int64_t most_columns = parts == 1 && plan.ks * plan.kc <= kWideK ? kWideColumns : kBlockColumns;
  int64_t rows = 1, columns = ceil_div(n, most_columns);
  while (alone && rows * columns < 2 * plan.threads && plan.ms / rows >= 2 * kLanes) ++rows;
  while (alone && rows * columns < plan.threads && n / columns >= 2 * kSmallestBlock) ++columns;
  while (!alone && rows * columns < 2 * plan.threads) {
    const bool split_rows = plan.ms / rows >= n / columns;
    if ((split_rows ? plan.ms / rows : n / columns) < 2 * kSmallestBlock) break;
    ++(split_rows ? rows : columns);
  }
  plan.mb = even(plan.ms, rows);
  plan.nb = even(n, columns);
  plan.share_a = !alone && plan.nb < n;

  const int64_t block_bytes = packed_bytes(plan.nb / kLanes, depth.most_chunks(), parts);
  plan.group = smaller(plan.ks, larger<int64_t>(1, kGroupBytes / block_bytes));

  // A thread's own: sums, and what it packs alone.
  const auto own = [&](int64_t panels) {
    return packed_bytes(panels, plan.group * depth.most_chunks(), parts) + range_bytes(panels, plan.group);
  };
  plan.private_bytes =
      static_cast<size_t>(sums_bytes(plan) + (plan.share_a ? 0 : own(1)) + (plan.b_packed ? 0 : own(plan.nb / kLanes)));
  plan.private_at = plan.share_a ? static_cast<size_t>(shared() + range_bytes(plan.ms / kLanes, plan.ks)) : 0;
  plan.total = plan.private_at + static_cast<size_t>(plan.threads) * plan.private_bytes;
  return plan;
}

// sums += block, of a register tile.
inline void add_tile(const float* block, float* sums, int rows, int cols) {
  const int width = cols > 16 ? 2 : 1;  // the unit has stored no more
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < width; ++v) {
      const int at = r * kLanes + v * 16;
      (Vec<float>::load(sums + at) + Vec<float>::load(block + at)).store(sums + at);
    }
}

// sums (+)= A B by parts.
template <int parts>
inline void multiply_parts(int64_t chunks, const unsigned char* a, const unsigned char* b, int rows, int cols,
                           bool first, float* sums, const unsigned char* ahead) {
  if (rows > 16)
    cols > 16 ? multiply_parts<parts, true, true>(chunks, a, b, first, sums, ahead)
              : multiply_parts<parts, true, false>(chunks, a, b, first, sums, ahead);
  else
    cols > 16 ? multiply_parts<parts, false, true>(chunks, a, b, first, sums, ahead)
              : multiply_parts<parts, false, false>(chunks, a, b, first, sums, ahead);
}

// sums (+)= A B of blocks whose smallest products lose parts of themselves. Each of them loses less than 2^-123, a sum
// less than 2^-115, which is nothing beside a sum of at least 2^-80. Returns whether all are; if not, it adds nothing.
template <int parts>
__attribute__((noinline)) bool multiply_wide(int64_t chunks, const unsigned char* a, const unsigned char* b, int rows,
                                             int cols, bool first, float* sums, const unsigned char* ahead) {
  alignas(64) float block[kLanes * kLanes];
  multiply_parts<parts>(chunks, a, b, rows, cols, true, block, ahead);
  const __m512i least = _mm512_set1_epi32((127 - 80) << 23), magnitude = _mm512_set1_epi32(0x7fffffff);
  const __mmask16 left = first16(smaller(cols, 16)), right = first16(larger(cols - 16, 0));
  for (int r = 0; r < rows; ++r) {
    const float* const row = block + r * kLanes;
    const auto small = [&](const float* at, __mmask16 mask) {
      return _mm512_mask_cmplt_epi32_mask(mask, _mm512_and_si512(_mm512_loadu_si512(at), magnitude), least);
    };
    if ((small(row, left) | small(row + 16, right)) != 0) return false;
  }
  if (first)
    __builtin_memcpy(sums, block, static_cast<size_t>(rows) * kLanes * 4);
  else
    add_tile(block, sums, rows, cols);
  return true;
}

// The product of two blocks, or of what they hold instead.
template <int parts>
inline void multiply_blocks(int64_t chunks, int64_t k, const unsigned char* a, Range a_range, const unsigned char* b,
                            Range b_range, int rows, int cols, bool first, float* sums, const unsigned char* ahead) {
  if (parts > 1 && !in_range(a_range, b_range)) {
    const bool wide =
        have_parts(a_range, b_range) && multiply_wide<parts>(chunks, a, b, rows, cols, first, sums, ahead);
    if (!wide) multiply_values<parts>(k, a, a_range, b, b_range, first, sums);
    return;
  }
  multiply_parts<parts>(chunks, a, b, rows, cols, first, sums, ahead);
}

// A register tile of complete sums goes to y.
template <class T>
inline void finish_tile(const Output<T>& out, float* sums, int64_t i, int64_t j, int rows, int cols) {
  const bool simple = out.f == nullptr && out.z == nullptr;
  const float* const bias = out.bias == nullptr ? nullptr : out.bias + (out.bias_of_rows ? i : j);
  if constexpr (same_type<T, bf16_t>) {
    if (simple && cols == kLanes)
      return store_wide(out.relu, sums, kLanes, bias, out.bias_of_rows, out.stream, out.y + i * out.rs + j, out.rs,
                        rows);
  }
  const int left = smaller(cols, 16), right = cols - left;
  for (int r = 0; r < rows; ++r) {
    float* const row = sums + r * kLanes;
    const int64_t at = (i + r) * out.rs + j;
    Vec<float> v[2] = {Vec<float>::load(row), Vec<float>::load(row + 16)};
    if (bias != nullptr) {
      v[0] = v[0] + (out.bias_of_rows ? Vec<float>::set1(bias[r]) : Vec<float>::load(bias, left));
      v[1] = v[1] + (out.bias_of_rows ? Vec<float>::set1(bias[r]) : Vec<float>::load(bias + 16, right));
    }
    if constexpr (same_type<T, float>) {
      if (out.residual != nullptr) {
        v[0] = v[0] + Vec<float>::load(out.residual + at, left);
        v[1] = v[1] + Vec<float>::load(out.residual + at + 16, right);
      }
    }
    if (out.relu != kNoRectifier) {
      v[0] = rectified(v[0], out.relu);
      v[1] = rectified(v[1], out.relu);
    }
    if (simple) {
      v[0].store(out.y + at, left);
      v[1].store(out.y + at + 16, right);
    } else {
      v[0].store(row);
      v[1].store(row + 16);
    }
  }
  if (simple) return;
  if constexpr (same_type<T, bf16_t>)
    finish_wide(out, sums, i, j, rows, cols);
  else
    finish_rows(out, sums, kLanes, i, j, rows, cols);
}

// Sums of the blocks of k before this one, which wait in y.
inline void load_tile(const Output<float>& out, float* sums, int64_t i, int64_t j, int rows, int cols) {
  for (int r = 0; r < rows; ++r) {
    const float* const y = out.y + (i + r) * out.rs + j;
    Vec<float>::load(y, smaller(cols, 16)).store(sums + r * kLanes);
    Vec<float>::load(y + 16, larger(cols - 16, 0)).store(sums + r * kLanes + 16);
  }
}
inline void store_tile(const Output<float>& out, const float* sums, int64_t i, int64_t j, int rows, int cols) {
  for (int r = 0; r < rows; ++r) {
    float* const y = out.y + (i + r) * out.rs + j;
    Vec<float>::load(sums + r * kLanes).store(y, smaller(cols, 16));
    Vec<float>::load(sums + r * kLanes + 16).store(y + 16, larger(cols - 16, 0));
  }
}

template <class P, class T>
void blocks_member(const Gemm<T>& g, const GemmPlan& plan, unsigned char* workspace, Crew& crew) {
  using Kind = Blocks<P>;
  constexpr int parts = Kind::parts;
  constexpr bool apart = parts == 3;  // what is less exact for other reasons need not be
  const AmxSession session;
  const DepthBlocks depth = {g.k, plan.kc, g.k_images};
  unsigned char* const own = workspace + plan.private_at + static_cast<size_t>(crew.thread) * plan.private_bytes;
  float* const block_sums = reinterpret_cast<float*>(own);
  float* const row_sums = block_sums + (plan.group < plan.ks ? plan.mb : kLanes) * plan.nb;
  // Of `panels` panels from block of k `first` on, in memory for `bytes` of them.
  const auto view = [&](unsigned char* data, int64_t bytes, int64_t panels, int64_t first) {
    return PackedBlocks{data, reinterpret_cast<Range*>(data + bytes), panels, first, parts * kPartBytes, depth};
  };
  const auto of_image = [](const Source<T>& s, int64_t offset) {
    Source<T> result = s;
    result.p += offset;
    if (s.saved != nullptr) result.saved += offset;
    return result;
  };

  const int64_t image_panels = ceil_div(g.n, kLanes), panels = g.images * image_panels, blocks = depth.count();
  for (int64_t k0 = 0; k0 < blocks; k0 += plan.ks) {
    const int64_t k1 = smaller(k0 + plan.ks, blocks);
    for (int64_t is = 0; is < g.m; is += plan.ms) {
      const int64_t rows = smaller(plan.ms, g.m - is);
      const PackedBlocks shared = view(workspace, packed_bytes(plan.ms / kLanes, plan.ks * depth.most_chunks(), parts),
                                       ceil_div(rows, kLanes), k0);
      const auto pack_a = [&](const PackedBlocks& to, int64_t kb, int64_t panel, int64_t row, int64_t last_row) {
        to.range(kb, panel) =
            Kind::pack(true, of_image(g.a, depth.image(kb) * g.a_k_image), row,
                       static_cast<int>(smaller<int64_t>(kLanes, last_row - row)), depth.first(kb), depth.length(kb),
                       to.block(kb, panel), g.a_sums != nullptr ? g.a_sums + row : nullptr);
      };
      if (plan.share_a && !crew.share(shared.panels, [&](int64_t panel) {
            for (int64_t kb = k0; kb < k1; ++kb) pack_a(shared, kb, panel, is + panel * kLanes, is + rows);
          }))
        return;

      const int64_t in_row = ceil_div(rows, plan.mb), in_column = ceil_div(panels, plan.nb / kLanes);
      const bool stays = crew.share(in_row * in_column, [&](int64_t job) {
        const int64_t i0 = is + job % in_row * plan.mb, i1 = smaller(i0 + plan.mb, is + rows);
        const int64_t panel0 = job / in_row * (plan.nb / kLanes);
        const int64_t high = ceil_div(i1 - i0, kLanes), wide = smaller(plan.nb / kLanes, panels - panel0);
        struct Columns {
          int64_t image, j;
          int count;
        };
        const auto columns = [&](int64_t q) {
          const int64_t j = (panel0 + q) % image_panels * kLanes;
          return Columns{(panel0 + q) / image_panels, j, static_cast<int>(smaller<int64_t>(kLanes, g.n - j))};
        };
        const auto output = [&](int64_t image) {
          Output<T> result = g.out;
          result.y += image * g.y_image;
          if (result.z != nullptr) result.z += image * g.y_image;
          if (result.residual != nullptr) result.residual += image * g.y_image;
          return result;
        };
        const bool waits = plan.group < plan.ks;  // sums of a group, for the next one
        const auto tile_sums = [&](int64_t p, int64_t q) {
          return block_sums + ((waits ? p : 0) * wide + q) * kLanes * kLanes;
        };
        const auto tile_rows = [&](int64_t p) {
          return static_cast<int>(smaller<int64_t>(kLanes, i1 - i0 - p * kLanes));
        };

        for (int64_t g0 = k0; g0 < k1; g0 += plan.group) {
          const int64_t g1 = smaller(g0 + plan.group, k1);
          const int64_t most_chunks = plan.group * depth.most_chunks();
          unsigned char* free = own + sums_bytes(plan);
          PackedBlocks a = shared, b;
          int64_t a_panel = (i0 - is) / kLanes, b_panel = 0;
          if (!plan.share_a) {
            const int64_t bytes = packed_bytes(1, most_chunks, parts);
            a = view(free, bytes, 1, g0);
            free += bytes + range_bytes(1, plan.group);
          }
          if (plan.b_packed) {
            b = view(static_cast<unsigned char*>(const_cast<void*>(g.b_packed)),
                     packed_bytes(panels, depth.chunks_before(blocks), parts), panels, 0);
            b_panel = panel0;
          } else {
            b = view(free, packed_bytes(plan.nb / kLanes, most_chunks, parts), wide, g0);
            for (int64_t q = 0; q < wide; ++q) {
              const Columns at = columns(q);
              for (int64_t kb = g0; kb < g1; ++kb) {
                const Source<T> source = of_image(g.b, at.image * g.b_image + depth.image(kb) * g.b_k_image);
                b.range(kb, q) = Kind::pack(false, source, at.j, at.count, depth.first(kb), depth.length(kb),
                                            b.block(kb, q), nullptr);
              }
            }
          }
          for (int64_t p = 0; p < high; ++p) {
            const int64_t of_a = plan.share_a ? a_panel + p : 0;
            for (int64_t kb = g0; !plan.share_a && kb < g1; ++kb) pack_a(a, kb, 0, i0 + p * kLanes, i1);
            for (int64_t kb = g0; kb < g1; ++kb) {
              const int64_t length = depth.length(kb), chunks = depth.chunks(kb);
              // What is prefetched: the next panel of A.
              const unsigned char* const next =
                  kb + 1 < g1 ? a.block(kb + 1, of_a) : a.block(g0, p + 1 < high ? of_a + 1 : of_a);
              const int64_t step = ceil_div(chunks * parts * kPartBytes / 64, wide) * 64;
              for (int64_t q = 0; q < wide; ++q) {
                const Columns at = columns(q);
                if constexpr (same_type<T, float>) {
                  if (kb == k0 && k0 > 0)
                    load_tile(output(at.image), tile_sums(p, q), i0 + p * kLanes, at.j, tile_rows(p), at.count);
                }
                multiply_blocks<parts>(chunks, length, a.block(kb, of_a), a.range(kb, of_a), b.block(kb, b_panel + q),
                                       b.range(kb, b_panel + q), tile_rows(p), at.count, apart || kb == 0,
                                       apart && kb > 0 ? row_sums + q * kLanes * kLanes : tile_sums(p, q),
                                       next + q * step);
              }
              // What the unit has stored is read a row of tiles later: loads right behind it would wait for it.
              for (int64_t q = 0; apart && kb > 0 && q < wide; ++q)
                add_tile(row_sums + q * kLanes * kLanes, tile_sums(p, q), tile_rows(p), columns(q).count);
            }
            for (int64_t q = 0; g1 == k1 && q < wide; ++q) {
              const Columns at = columns(q);
              const Output<T> out = output(at.image);
              if constexpr (same_type<T, float>) {
                if (k1 < blocks) {
                  store_tile(out, tile_sums(p, q), i0 + p * kLanes, at.j, tile_rows(p), at.count);
                  continue;
                }
              }
              finish_tile(out, tile_sums(p, q), i0 + p * kLanes, at.j, tile_rows(p), at.count);
            }
          }
        }
      });
      if (!stays) return;
    }
  }
}

// The whole of B ahead of the product.
template <class P, class T>
size_t packed_blocks_bytes(const Gemm<T>& g) {
  const DepthBlocks depth = {g.k, Blocks<P>::kc, 1};
  const int64_t panels = ceil_div(g.n, kLanes);
  return aligned(packed_bytes(panels, depth.chunks_before(depth.count()), Blocks<P>::parts) +
                 range_bytes(panels, depth.count()));
}
template <class P, class T>
void pack_blocks(const Gemm<T>& g, void* to) {
  using Kind = Blocks<P>;
  const DepthBlocks depth = {g.k, Kind::kc, 1};
  const int64_t panels = ceil_div(g.n, kLanes);
  unsigned char* const data = static_cast<unsigned char*>(to);
  const int64_t bytes = packed_bytes(panels, depth.chunks_before(depth.count()), Kind::parts);
  const PackedBlocks b = {data, reinterpret_cast<Range*>(data + bytes), panels, 0, Kind::parts * kPartBytes, depth};
  for (int64_t p = 0; p < panels; ++p)
    for (int64_t kb = 0; kb < depth.count(); ++kb)
      b.range(kb, p) = Kind::pack(false, g.b, p * kLanes, static_cast<int>(smaller<int64_t>(kLanes, g.n - p * kLanes)),
                                  depth.first(kb), depth.length(kb), b.block(kb, p), nullptr);
}

#endif
