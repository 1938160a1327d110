// Products by AMX in blocks of C that stay in L2: C[i, j] is 256 x 256 elements, whose sums of one block of k after the
// other are added in a tile-major scratch block, while the next blocks of A and B are prefetched from L3. Measured on
// Granite Rapids (2 MB L2, registers alone 3500 GF/s): 256 x 256 x 256 is 1800 GF/s with A and B in L2, 1400 with both
// in L3, 1600 with prefetching; longer blocks of k evict the panel of B from L1, wider ones of C leave L2.
//
// Operands are packed as a whole by all threads, one that only one block of C needs by whoever computes that block.
// Every element of C is a sum over blocks of k in order, whose length depends on the type alone: the result does not
// depend on the number of threads.
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
  static constexpr int64_t kc = n == 1 ? 256 : n == 2 ? 192 : 128;  // a panel of B takes half of L1

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
  static constexpr int64_t kc = 256;

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
constexpr int64_t kSmallestBlock = 64;  // where there are few
// Packed rows of A take at most this many bytes.
constexpr int64_t kMostPacked = 32 << 20;

// The packed panels of an operand from the first lane and the first k of a phase on. Blocks of one k follow each other.
struct PackedBlocks {
  unsigned char* data;
  Range* ranges;
  int64_t panels;
  int64_t kc, k, bytes;  // bytes: of a panel's 32 k

  int64_t chunks(int64_t kb) const { return ceil_div(smaller(kc, k - kb * kc), kTileK); }
  unsigned char* block(int64_t kb, int64_t panel) const {
    return data + (kb * (kc / kTileK) * panels + panel * chunks(kb)) * bytes;
  }
  Range& range(int64_t kb, int64_t panel) const { return ranges[kb * panels + panel]; }
};

inline int64_t packed_bytes(int64_t panels, int64_t k, int parts) {
  return panels * ceil_div(k, kTileK) * parts * kPartBytes;
}
inline int64_t range_bytes(int64_t panels, int64_t k, int64_t kc) {
  return round_up(panels * ceil_div(k, kc) * static_cast<int64_t>(sizeof(Range)), 64);
}

// Fills a plan, which is `blocked` then: a, b, partial and total are offsets in the workspace.
template <class P, class T>
GemmPlan plan_blocks(const Gemm<T>& g, int threads) {
  using Kind = Blocks<P>;
  constexpr int parts = Kind::parts;
  constexpr bool kSumsInY = same_type<T, Compute<T>>;
  GemmPlan plan{};
  plan.blocked = true;
  plan.b_packed = g.b_packed != nullptr;
  const double flop = 2.0 * static_cast<double>(g.m) * static_cast<double>(g.n) * static_cast<double>(g.k);
  plan.threads = static_cast<int>(smaller(static_cast<double>(threads), larger(1.0, flop / kFlopPerThread)));
  plan.kc = Kind::kc;

  const int64_t k = round_up(g.k, kTileK), m = round_up(g.m, kLanes), n = round_up(g.n, kLanes);
  const auto even = [](int64_t lanes, int64_t blocks) { return round_up(ceil_div(lanes, blocks), kLanes); };
  plan.ms = even(m, ceil_div(m, kBlockRows));
  plan.ks = k;
  while (kSumsInY && plan.ms * plan.ks * 2 * parts > kMostPacked) plan.ks = round_up(plan.ks / 2, plan.kc);

  int64_t rows = 1, columns = ceil_div(n, kBlockColumns);
  while (rows * columns < 2 * plan.threads) {
    const bool split_rows = plan.ms / rows >= n / columns;
    if ((split_rows ? plan.ms / rows : n / columns) < 2 * kSmallestBlock) break;
    ++(split_rows ? rows : columns);
  }
  plan.mb = even(plan.ms, rows);
  plan.nb = even(n, columns);
  plan.share_a = plan.nb < n;

  int64_t at = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t begin = at;
    at += round_up(bytes, 64);
    return static_cast<size_t>(begin);
  };
  if (plan.share_a)
    plan.shared_at =
        take(packed_bytes(plan.ms / kLanes, plan.ks, parts) + range_bytes(plan.ms / kLanes, plan.ks, plan.kc));
  // A thread's own: the block of sums, and blocks of operands that it packs alone.
  const auto own = [&](int64_t lanes) { return packed_bytes(lanes / kLanes, plan.kc, parts) + 64; };
  plan.private_bytes = static_cast<size_t>(plan.mb * plan.nb * 4 + (plan.share_a ? 0 : own(plan.mb)) +
                                           (plan.b_packed ? 0 : own(plan.nb)));
  plan.private_at = take(plan.threads * static_cast<int64_t>(plan.private_bytes));
  plan.total = static_cast<size_t>(at);
  return plan;
}

// The product of two blocks, or of what they hold instead.
template <int parts>
inline void multiply_blocks(int64_t chunks, int64_t k, const unsigned char* a, Range a_range, const unsigned char* b,
                            Range b_range, int rows, int cols, bool first, float* sums, const unsigned char* ahead) {
  if (parts > 1 && !in_range(a_range, b_range)) return multiply_values<parts>(k, a, a_range, b, b_range, first, sums);
  if (rows > 16)
    cols > 16 ? multiply_parts<parts, true, true>(chunks, a, b, first, sums, ahead)
              : multiply_parts<parts, true, false>(chunks, a, b, first, sums, ahead);
  else
    cols > 16 ? multiply_parts<parts, false, true>(chunks, a, b, first, sums, ahead)
              : multiply_parts<parts, false, false>(chunks, a, b, first, sums, ahead);
}

// A register tile of complete sums goes to y.
template <class T>
inline void finish_tile(const Output<T>& out, float* sums, int64_t i, int64_t j, int rows, int cols) {
  const bool simple = out.f == nullptr && out.z == nullptr;
  if constexpr (same_type<T, bf16_t>) {
    if (simple && cols == kLanes) {
      const float* const bias = out.bias != nullptr ? out.bias + j : nullptr;
      return store_wide(out.relu, sums, kLanes, bias, false, out.stream, out.y + i * out.rs + j, out.rs, rows);
    }
  }
  const int left = smaller(cols, 16), right = cols - left;
  for (int r = 0; r < rows; ++r) {
    float* const row = sums + r * kLanes;
    const int64_t at = (i + r) * out.rs + j;
    Vec<float> v[2] = {Vec<float>::load(row), Vec<float>::load(row + 16)};
    if (out.bias != nullptr) {
      v[0] = v[0] + Vec<float>::load(out.bias + j, left);
      v[1] = v[1] + Vec<float>::load(out.bias + j + 16, right);
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
  if (!simple) finish_rows(out, sums, kLanes, i, j, rows, cols);
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
  constexpr int64_t kBytes = parts * kPartBytes;
  const AmxSession session;
  unsigned char* const own = workspace + plan.private_at + static_cast<size_t>(crew.thread) * plan.private_bytes;
  float* const block_sums = reinterpret_cast<float*>(own);
  const auto view = [&](unsigned char* data, int64_t panels, int64_t k, int64_t most_panels, int64_t most_k) {
    return PackedBlocks{
        data, reinterpret_cast<Range*>(data + packed_bytes(most_panels, most_k, parts)), panels, plan.kc, k, kBytes};
  };

  for (int64_t k0 = 0; k0 == 0 || k0 < g.k; k0 += plan.ks) {
    const int64_t k = smaller(plan.ks, g.k - k0);
    const bool continued = k0 > 0, complete = k0 + k >= g.k;
    for (int64_t is = 0; is < g.m; is += plan.ms) {
      const int64_t rows = smaller(plan.ms, g.m - is);
      const PackedBlocks shared =
          view(workspace + plan.shared_at, ceil_div(rows, kLanes), k, plan.ms / kLanes, plan.ks);
      const auto pack_a = [&](const PackedBlocks& to, int64_t to_kb, int64_t panel, int64_t row, int64_t last_row,
                              int64_t kb) {
        const int width = static_cast<int>(smaller<int64_t>(kLanes, last_row - row));
        to.range(to_kb, panel) =
            Kind::pack(true, g.a, row, width, k0 + kb * plan.kc, smaller(plan.kc, k - kb * plan.kc),
                       to.block(to_kb, panel), g.a_sums != nullptr ? g.a_sums + row : nullptr);
      };
      if (plan.share_a && !crew.share(shared.panels, [&](int64_t panel) {
            for (int64_t kb = 0; kb == 0 || kb * plan.kc < k; ++kb)
              pack_a(shared, kb, panel, is + panel * kLanes, is + rows, kb);
          }))
        return;

      const int64_t in_row = ceil_div(rows, plan.mb), in_column = ceil_div(g.n, plan.nb);
      const bool stays = crew.share(in_row * in_column, [&](int64_t job) {
        const int64_t i0 = is + job % in_row * plan.mb, j0 = job / in_row * plan.nb;
        const int64_t i1 = smaller(i0 + plan.mb, is + rows), j1 = smaller(j0 + plan.nb, g.n);
        const int64_t high = ceil_div(i1 - i0, kLanes), wide = ceil_div(j1 - j0, kLanes);
        const auto tile_sums = [&](int64_t p, int64_t q) { return block_sums + (p * wide + q) * kLanes * kLanes; };
        const auto tile_rows = [&](int64_t p) {
          return static_cast<int>(smaller<int64_t>(kLanes, i1 - i0 - p * kLanes));
        };
        const auto tile_cols = [&](int64_t q) {
          return static_cast<int>(smaller<int64_t>(kLanes, j1 - j0 - q * kLanes));
        };

        for (int64_t kb = 0; kb == 0 || kb * plan.kc < k; ++kb) {
          const int64_t length = smaller(plan.kc, k - kb * plan.kc), chunks = ceil_div(length, kTileK);
          const bool last = (kb + 1) * plan.kc >= k;
          unsigned char* free = own + plan.mb * plan.nb * 4;
          PackedBlocks a = shared, b;
          int64_t a_kb = kb, a_panel = (i0 - is) / kLanes, b_kb = 0, b_panel = 0;
          if (!plan.share_a) {
            a = view(free, high, length, plan.mb / kLanes, plan.kc);
            free += packed_bytes(plan.mb / kLanes, plan.kc, parts) + 64;
            a_kb = a_panel = 0;
            for (int64_t p = 0; p < high; ++p) pack_a(a, 0, p, i0 + p * kLanes, i1, kb);
          }
          if (plan.b_packed) {
            b = view(static_cast<unsigned char*>(const_cast<void*>(g.b_packed)), ceil_div(g.n, kLanes), g.k,
                     ceil_div(g.n, kLanes), g.k);
            b_kb = k0 / plan.kc + kb;
            b_panel = j0 / kLanes;
          } else {
            b = view(free, wide, length, plan.nb / kLanes, plan.kc);
            for (int64_t q = 0; q < wide; ++q)
              b.range(0, q) = Kind::pack(false, g.b, j0 + q * kLanes, tile_cols(q), k0 + kb * plan.kc, length,
                                         b.block(0, q), nullptr);
          }
          const int64_t step = chunks * Products<parts>::count * 4 * 64;  // bytes that a tile prefetches
          for (int64_t p = 0; p < high; ++p) {
            const unsigned char* const row_block = a.block(a_kb, a_panel + p);
            // The next panel of A, of this block of k or of the next one.
            const unsigned char* const next =
                p + 1 < high || !plan.share_a || last ? row_block + chunks * kBytes : a.block(a_kb + 1, a_panel);
            for (int64_t q = 0; q < wide; ++q) {
              float* const sums = tile_sums(p, q);
              if constexpr (same_type<T, float>) {
                if (continued && kb == 0)
                  load_tile(g.out, sums, i0 + p * kLanes, j0 + q * kLanes, tile_rows(p), tile_cols(q));
              }
              multiply_blocks<parts>(chunks, length, row_block, a.range(a_kb, a_panel + p), b.block(b_kb, b_panel + q),
                                     b.range(b_kb, b_panel + q), tile_rows(p), tile_cols(q), kb == 0 && !continued,
                                     sums, next + q * step);
            }
            // What the unit has stored is read a row of tiles later: loads right behind it would wait for it.
            for (int64_t q = 0; last && q < wide; ++q) {
              if constexpr (same_type<T, float>) {
                if (!complete) {
                  store_tile(g.out, tile_sums(p, q), i0 + p * kLanes, j0 + q * kLanes, tile_rows(p), tile_cols(q));
                  continue;
                }
              }
              finish_tile(g.out, tile_sums(p, q), i0 + p * kLanes, j0 + q * kLanes, tile_rows(p), tile_cols(q));
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
  const int64_t panels = ceil_div(g.n, kLanes);
  return aligned(packed_bytes(panels, g.k, Blocks<P>::parts) + range_bytes(panels, g.k, Blocks<P>::kc));
}
template <class P, class T>
void pack_blocks(const Gemm<T>& g, void* to) {
  using Kind = Blocks<P>;
  const int64_t panels = ceil_div(g.n, kLanes);
  unsigned char* const data = static_cast<unsigned char*>(to);
  const PackedBlocks b = {data,   reinterpret_cast<Range*>(data + packed_bytes(panels, g.k, Kind::parts)),
                          panels, Kind::kc,
                          g.k,    Kind::parts * kPartBytes};
  for (int64_t p = 0; p < panels; ++p)
    for (int64_t kb = 0; kb * Kind::kc < g.k; ++kb)
      b.range(kb, p) = Kind::pack(false, g.b, p * kLanes, static_cast<int>(smaller<int64_t>(kLanes, g.n - p * kLanes)),
                                  kb * Kind::kc, smaller(Kind::kc, g.k - kb * Kind::kc), b.block(kb, p), nullptr);
}

#endif
