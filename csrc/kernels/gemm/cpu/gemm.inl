// The matrix product around the microkernels: out = f(A B + bias) for A[m, k] and B[k, n] with any strides.
//
// One operand is shared: the whole team packs a block of it, then waits at a barrier. The other operand is private: its
// lanes are divided into strips. A thread takes the next strip, packs it one k block at a time, and multiplies it by
// the whole shared block. So there is one barrier for any number of k blocks, a private panel is still in the thread's
// L2 cache when it is used, and a thread that the system slows down takes fewer strips. An operand that the microkernel
// can read in place is not packed.
//
// Within a k block, every element of C is one chain of multiply-adds, in any tile and on any thread. The k blocks are
// added in order, and their length depends only on the shape. So the result does not depend on the number of threads.
#pragma once

#include "../../activation/cpu/activation.inl"
#include "../../common/cpu/common.inl"
#include "amx.inl"
#include "amx_blocks.inl"
#include "microkernels.inl"
#include "pack.inl"
#include "product.inl"

// Packed operands of at most this many bytes are on the stack, not in the workspace.
constexpr int64_t kTinyBytes = 24 * 1024;

// A is read in place if C has at most this many columns: with few columns, packing A costs more than it saves.
constexpr int64_t kDirectAColumns = 256;
// An A that is contiguous along its lanes is read in place if steps of k are at most this many elements apart.
constexpr int64_t kNarrow = 128;

// B is read in place if C has at most this many rows: each element of B is then used once or twice.
constexpr int64_t kDirectBRows = 2 * kMr;
#if defined(FASTOPS_VEC_AVX2)
// But not if its rows are a multiple of 4 KB apart, which fall into a few sets of L1, and are used twice. 8 rows, 4096
// x 4096: 1.6 to 1.7 times as fast packed (Zen 3, one thread).
constexpr bool kAliasedB = true;
#else
constexpr bool kAliasedB = false;
#endif

// Below kTallRows rows of A, strips of B are at most kLowStrip columns: 2 to 4% faster for 32 to 256 rows.
constexpr int64_t kTallRows = 512, kLowStrip = 128;

template <class P, class T>
inline bool reads_a_in_place(const Gemm<T>& g) {
  const Source<T>& a = g.a;
  if (a.derivative != nullptr || g.a_sums != nullptr || g.n > kDirectAColumns) return false;
  const bool along_k = a.ks == 1;
  if constexpr (Tile<P>::tiles_in_place) {  // only whole tiles whose rows do not cross cache lines
    constexpr int64_t kWhole = Tile<P>::k_align;
    return along_k && g.k % kWhole == 0 && a.ls % kWhole == 0 && reinterpret_cast<uintptr_t>(a.p) % 64 == 0;
  }
  const bool aliased = a.ls * static_cast<int64_t>(sizeof(T)) % 4096 == 0 && g.k > 64;
  return Tile<P>::readable && same_type<P, T> && (along_k || (a.ls == 1 && a.ks <= kNarrow)) && !(aliased && g.m > kMr);
}

// The length of strips, near `wanted` and at most `most`, with which the last thread is done the soonest if each takes
// the next strip when it is free. Nine strips on two threads take as long as ten.
inline int64_t even_strip(int64_t lanes, int64_t wanted, int64_t most, int threads) {
  const auto last_done = [&](int64_t strip) {
    const int64_t whole = lanes / strip;
    return whole % threads == 0 ? whole / threads * strip + lanes % strip : (whole / threads + 1) * strip;
  };
  int64_t best = wanted;
  for (int64_t strip = larger<int64_t>(1, wanted * 2 / 3); strip <= smaller(most, wanted * 3 / 2); ++strip) {
    const int64_t gain = last_done(best) - last_done(strip);
    if (gain > 0 || (gain == 0 && strip > best)) best = strip;
  }
  return best;
}

template <class P, class T>
GemmPlan plan_strips(const Gemm<T>& g, int threads) {
  using Kind = Tile<P>;
  constexpr int64_t mr = Kind::mr, nr = Kind::nr, step = Kind::step;
  constexpr GemmBlocking kBlocking = Kind::blocking;
  constexpr int64_t kElement = sizeof(typename Kind::B);
  constexpr bool kReadable = Kind::readable && same_type<P, T>;
  GemmPlan plan{};
  const auto pack_ahead = [&] {
    plan.b_packed = g.b_packed != nullptr && !plan.b_direct;
    if (plan.b_packed) plan.b_panel = nr * (round_up(g.k, Kind::k_align) / step);
  };
  const int64_t m = larger<int64_t>(g.m, 1), n = larger<int64_t>(g.n, 1), k = larger<int64_t>(g.k, 1);

  const int64_t blocks = ceil_div(k, kBlocking.kc);
  plan.kc = round_up(ceil_div(k, blocks), larger(16, Kind::k_align));
  plan.ks = smaller(round_up(k, plan.kc), kBlocking.ks / plan.kc * plan.kc);

  const bool a_plain = kReadable && g.a.derivative == nullptr && g.a_sums == nullptr;
  const bool b_plain = kReadable && g.b.derivative == nullptr && g.b.ls == 1;
  const int64_t a_tiny = round_up(m, mr) * round_up(k, Kind::k_align) / step * kElement;
  const int64_t b_tiny = round_up(n, nr) * round_up(k, Kind::k_align) / step * kElement;
  if (a_tiny <= kTinyBytes && b_tiny <= kTinyBytes && m * n <= kTinyBytes / 4) {
    plan.tiny = true;
    plan.threads = 1;
    plan.a_direct = a_plain;
    plan.b_direct = b_plain;
    pack_ahead();
    plan.kc = plan.ks = k;
    plan.mb = m;
    plan.nb = n;
    return plan;
  }
  plan.a_direct = reads_a_in_place<P>(g);
  const bool b_aliased = kAliasedB && g.b.ks * static_cast<int64_t>(sizeof(T)) % 4096 == 0 && k > 64 && m > mr;
  plan.b_direct = b_plain && m <= kDirectBRows && !b_aliased;
  pack_ahead();
  plan.share_a = n >= m;

  const double flop = 2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k);
  plan.threads = static_cast<int>(smaller(static_cast<double>(threads), larger(1.0, flop / kFlopPerThread)));

  const int64_t sw = plan.share_a ? mr : nr, pw = plan.share_a ? nr : mr;  // panel widths, shared and private
  const int64_t shared = plan.share_a ? m : n, priv = plan.share_a ? n : m;
  const int64_t most = larger<int64_t>(kBlocking.shared_bytes / (plan.ks / step * kElement), 4 * sw);
  int64_t shared_block = round_up(ceil_div(shared, ceil_div(shared, most)), sw);
  int64_t private_block = priv;
  const bool partial = !same_type<T, Compute<T>> && plan.kc < k;
  if (partial) {
    shared_block = smaller<int64_t>(shared_block, round_up(1024, sw));
    private_block = smaller<int64_t>(priv, round_up(kBlocking.partial_elements / 1024, pw));
  }
  plan.mb = plan.share_a ? shared_block : private_block;
  plan.nb = plan.share_a ? private_block : shared_block;

  const int64_t columns = m < kTallRows ? smaller(kBlocking.strip, kLowStrip) : kBlocking.strip;
  const int64_t most_strip = plan.share_a ? columns : kBlocking.strip_rows;
  const int64_t wanted = plan.threads == 1 ? 1 : 4 * plan.threads;
  const int64_t strips =
      larger<int64_t>(ceil_div(private_block, most_strip), smaller(wanted, ceil_div(private_block, pw)));
  plan.strip = round_up(ceil_div(private_block, strips), pw);
  if (strips >= plan.threads)
    plan.strip = pw * even_strip(ceil_div(private_block, pw), plan.strip / pw, most_strip / pw, plan.threads);
  plan.parts = 1;
  if (strips < plan.threads)
    plan.parts = larger<int64_t>(1, smaller(ceil_div(2 * plan.threads, strips), ceil_div(shared_block, sw)));

  const int64_t k_shared = plan.ks / step, k_private = plan.kc / step;
  plan.a_panel = mr * (plan.share_a ? k_shared : k_private);
  if (!plan.b_packed) plan.b_panel = nr * (plan.share_a ? k_private : k_shared);
  const bool b_ready = plan.b_direct || plan.b_packed;
  const bool shared_direct = plan.share_a ? plan.a_direct : b_ready;
  const bool private_direct = plan.share_a ? b_ready : plan.a_direct;
  size_t at = 0;
  plan.shared_at = at;
  if (!shared_direct) at += static_cast<size_t>(round_up(shared_block, sw) * k_shared * kElement);
  plan.private_bytes = private_direct ? 0 : static_cast<size_t>(round_up(plan.strip * k_private * kElement, 64));
  plan.private_at = at = static_cast<size_t>(round_up(static_cast<int64_t>(at), 64));
  at += plan.private_bytes * static_cast<size_t>(plan.threads);
  plan.partial_at = at;
  if (partial) at += static_cast<size_t>(plan.mb * (plan.nb + 16)) * sizeof(Compute<T>);
  plan.total = static_cast<size_t>(round_up(static_cast<int64_t>(at), 64));
  return plan;
}

// Products in blocks (amx_blocks.inl): not where A is read in place, nor where there is little to share. Emerald
// Rapids, one thread, in strips and in blocks, times oneDNN's speed: k of 512 0.93 and 1.17, 384 1.04 and 1.13, 256 to
// 300 1.00 to 1.24 and 0.95 to 1.17.
constexpr int64_t kBlockedRows = 256, kBlockedK = 384, kMostBlockedK = 16384;  // 1024 packed rows are then 32 MB

template <class P, class T>
inline bool takes_blocks(const Gemm<T>& g) {
  return Blocks<P>::some && g.m >= kBlockedRows && g.n > kDirectAColumns && g.k >= kBlockedK && g.k <= kMostBlockedK;
}

template <class P, class T>
GemmPlan plan_gemm(const Gemm<T>& g, int threads) {
  if constexpr (Blocks<P>::all) {
    return plan_blocks<P>(g, threads);
  } else {
    if constexpr (Blocks<P>::some)
      if (takes_blocks<P>(g)) return plan_blocks<P>(g, threads);
    return plan_strips<P>(g, threads);
  }
}

// A large output of short sums is bound by memory. Non-temporal stores do not read its cache lines first. Measured with
// the weight's gradient of 32 x 4096 x 4096: 64 MB of float32.
constexpr int64_t kStreamBytes = 16 << 20;
constexpr int64_t kStreamK = 256;

template <class T>
inline bool streams(const Gemm<T>& g, const GemmPlan& plan) {
  const int64_t row = g.out.rs * static_cast<int64_t>(sizeof(T));
  return g.k <= smaller(kStreamK, plan.kc) && g.out.f == nullptr && g.out.z == nullptr && row % 64 == 0 &&
         reinterpret_cast<uintptr_t>(g.out.y) % 64 == 0 && g.m * row >= kStreamBytes;
}

template <class P>
inline PanelView<P> packed_view(const P* p, int64_t panel, int width) {
  return {p, panel, 1, width};
}
template <class P, class T>
inline PanelView<P> direct_view(const Source<T>& s, int64_t lane, int64_t k0, int width) {
  if constexpr (same_type<P, T>)
    return {s.p + lane * s.ls + k0 * s.ks, width * s.ls, s.ls, s.ks};
  else  // AMX: pairs of neighbours along k
    return {reinterpret_cast<const P*>(s.p + lane * s.ls + k0), width * s.ls / 2, s.ls / 2, 1};
}

struct Partial {
  void* sums;
  int64_t rs, i0, j0;  // where the block starts in C
};

// body(i, j, rows, cols) for the register tiles of an m x n block of C. Tiles that are neighbours in memory follow each
// other closely, so that the processor prefetches C: 5% faster than long columns of tiles.
template <class P, class Body>
inline void for_each_tile(int64_t m, int64_t n, Body&& body) {
  constexpr int mr = Tile<P>::mr, nr = Tile<P>::nr;
  constexpr GemmBlocking kBlocking = Tile<P>::blocking;
  for (int64_t jc = 0; jc < n; jc += kBlocking.strip) {
    const int64_t je = smaller(jc + kBlocking.strip, n);
    for (int64_t ic = 0; ic < m; ic += kBlocking.mc) {
      const int64_t ie = smaller(ic + kBlocking.mc, m);
      for (int64_t j = jc; j < je; j += nr)
        for (int64_t i = ic; i < ie; i += mr)
          body(i, j, static_cast<int>(smaller<int64_t>(mr, ie - i)), static_cast<int>(smaller<int64_t>(nr, je - j)));
    }
  }
}

// One k block of rows [i0, i1) and columns [j0, j1) of C. i0 and j0 are panel boundaries of the views.
template <class P, class T>
void multiply_block(const Output<T>& out, const PanelView<typename Tile<P>::A>& a,
                    const PanelView<typename Tile<P>::B>& b, int64_t i0, int64_t i1, int64_t j0, int64_t j1, int64_t k,
                    bool first, bool last, const Partial& partial) {
  for_each_tile<P>(i1 - i0, j1 - j0, [&](int64_t i, int64_t j, int rows, int cols) {
    Compute<T>* sums = static_cast<Compute<T>*>(partial.sums);
    if (sums != nullptr) sums += (i0 + i - partial.i0) * partial.rs + (j0 + j - partial.j0);
    // The first tiles of a packed panel of B prefetch the next panel, a cache line for each of their k.
    const int64_t lines = i / Tile<P>::mr * k, line = 64 / static_cast<int64_t>(sizeof *b.p);
    const bool prefetches = b.ks == Tile<P>::nr && j + Tile<P>::nr < j1 - j0 && lines * line < Tile<P>::nr * k;
    const void* const ahead = prefetches ? b.p + (j / Tile<P>::nr + 1) * b.panel + lines * line : nullptr;
    output_tile(P{}, k, a, a.p + i / Tile<P>::mr * a.panel, b, b.p + j / Tile<P>::nr * b.panel, i0 + i, j0 + j, rows,
                cols, first, last, out, sums, partial.rs, ahead);
  });
}

template <class P, class T>
__attribute__((noinline)) void gemm_tiny(const Gemm<T>& g, const GemmPlan& plan) {
  using Kind = Tile<P>;
  using A = typename Kind::A;
  using B = typename Kind::B;
  constexpr int mr = Kind::mr, nr = Kind::nr;
  alignas(64) unsigned char a_buffer[kTinyBytes];
  alignas(64) unsigned char b_buffer[kTinyBytes];
  const typename Kind::Session session;
  const int64_t k = round_up(g.k, Kind::k_align) / Kind::step;
  PanelView<A> a;
  PanelView<B> b;
  if (plan.a_direct) {
    a = direct_view<A>(g.a, 0, 0, mr);
  } else {
    A* const to = reinterpret_cast<A*>(a_buffer);
    pack<A, T, mr>(g.a, 0, g.m, 0, g.k, to, mr * k, g.a_sums);
    a = packed_view<A>(to, mr * k, mr);
  }
  if (plan.b_direct) {
    b = direct_view<B>(g.b, 0, 0, nr);
  } else if (plan.b_packed) {
    b = packed_view<B>(static_cast<const B*>(g.b_packed), plan.b_panel, nr);
  } else {
    B* const to = reinterpret_cast<B*>(b_buffer);
    pack<B, T, nr>(g.b, 0, g.n, 0, g.k, to, nr * k, nullptr);
    b = packed_view<B>(to, nr * k, nr);
  }
  multiply_block<P, T>(g.out, a, b, 0, g.m, 0, g.n, k, true, true, {nullptr, 0, 0, 0});
}

// The work of one thread of the team.
template <class P, class T>
void gemm_member(const Gemm<T>& g, const GemmPlan& plan, unsigned char* workspace, Crew& crew) {
  using C = Compute<T>;
  using Kind = Tile<P>;
  using A = typename Kind::A;
  using B = typename Kind::B;
  constexpr int mr = Kind::mr, nr = Kind::nr, step = Kind::step;
  const typename Kind::Session session;
  unsigned char* const shared_panels = workspace + plan.shared_at;
  unsigned char* const private_panels =
      workspace + plan.private_at + static_cast<size_t>(crew.thread) * plan.private_bytes;
  A* const a_panels = reinterpret_cast<A*>(plan.share_a ? shared_panels : private_panels);
  B* const b_panels = reinterpret_cast<B*>(plan.share_a ? private_panels : shared_panels);
  C* const partial_sums = plan.partial_at < plan.total ? reinterpret_cast<C*>(workspace + plan.partial_at) : nullptr;
  const bool share_a = plan.share_a;
  const bool b_ready = plan.b_direct || plan.b_packed;
  const bool shared_direct = share_a ? plan.a_direct : b_ready;
  const bool private_direct = share_a ? b_ready : plan.a_direct;
  // B where it needs no packing, from this column and this k on.
  const auto ready_b = [&](int64_t lane, int64_t kk) {
    if (plan.b_direct) return direct_view<B>(g.b, lane, kk, nr);
    return packed_view<B>(static_cast<const B*>(g.b_packed) + lane / nr * plan.b_panel + kk / step * nr, plan.b_panel,
                          nr);
  };
  const int sw = share_a ? mr : nr;
  int64_t packed_lane = -1, packed_k = -1;  // the block that the shared panels hold; lanes and k start at 0

  for (int64_t jb = 0; jb < g.n; jb += plan.nb) {
    const int64_t je = smaller(jb + plan.nb, g.n);
    for (int64_t ib = 0; ib < g.m; ib += plan.mb) {
      const int64_t ie = smaller(ib + plan.mb, g.m);
      const Partial partial = {partial_sums, plan.nb + 16, ib, jb};
      for (int64_t k0 = 0; k0 == 0 || k0 < g.k; k0 += plan.ks) {
        const int64_t ke = smaller(k0 + plan.ks, g.k);
        C* const sums = jb == 0 ? g.a_sums : nullptr;
        const int64_t s0 = share_a ? ib : jb, s1 = share_a ? ie : je;  // shared lanes
        const int64_t p0 = share_a ? jb : ib, p1 = share_a ? je : ie;  // private lanes

        if (!shared_direct && (packed_lane != s0 || packed_k != k0)) {
          packed_lane = s0;
          packed_k = k0;
          // Long pieces of each row if lanes are contiguous, but enough units to balance the threads.
          const bool derived = (share_a ? g.a.derivative : g.b.derivative) != nullptr;
          const int64_t least = derived ? 96 / sw * sw : sw;
          const int64_t group = larger<int64_t>(least, smaller<int64_t>(384, (s1 - s0) / (4 * plan.threads)) / sw * sw);
          const bool whole_k = share_a && sums != nullptr;  // one thread adds up a lane's sum, in order
          const int64_t k_unit = whole_k ? plan.ks : plan.kc;
          const int64_t k_units = larger<int64_t>(1, ceil_div(ke - k0, k_unit));
          const bool packed = crew.share(ceil_div(s1 - s0, group) * k_units, [&](int64_t unit) {
            const int64_t lane = unit / k_units * group, kk = unit % k_units * k_unit;
            const int64_t lanes = smaller(group, s1 - s0 - lane), length = smaller(k_unit, ke - k0 - kk);
            if (share_a)
              pack<A, T, mr>(g.a, s0 + lane, lanes, k0 + kk, length,
                             a_panels + lane / mr * plan.a_panel + kk / step * mr, plan.a_panel,
                             sums != nullptr ? sums + s0 + lane : nullptr);
            else
              pack<B, T, nr>(g.b, s0 + lane, lanes, k0 + kk, length,
                             b_panels + lane / nr * plan.b_panel + kk / step * nr, plan.b_panel, nullptr);
          });
          if (!packed) return;
        }

        const int64_t part = round_up(ceil_div(s1 - s0, plan.parts), sw);
        const bool stays = crew.share(ceil_div(p1 - p0, plan.strip) * plan.parts, [&](int64_t job) {
          const int64_t l0 = p0 + job / plan.parts * plan.strip, l1 = smaller(l0 + plan.strip, p1);
          const int64_t t0 = smaller(s0 + job % plan.parts * part, s1), t1 = smaller(t0 + part, s1);
          for (int64_t kk = k0; kk == k0 || kk < ke; kk += plan.kc) {
            const int64_t length = smaller(plan.kc, ke - kk);
            PanelView<A> a;
            PanelView<B> b;
            if (share_a) {
              a = plan.a_direct ? direct_view<A>(g.a, t0, kk, mr)
                                : packed_view<A>(a_panels + (t0 - s0) / mr * plan.a_panel + (kk - k0) / step * mr,
                                                 plan.a_panel, mr);
              if (!private_direct) pack<B, T, nr>(g.b, l0, l1 - l0, kk, length, b_panels, plan.b_panel, nullptr);
              b = b_ready ? ready_b(l0, kk) : packed_view<B>(b_panels, plan.b_panel, nr);
            } else {
              b = b_ready ? ready_b(t0, kk)
                          : packed_view<B>(b_panels + (t0 - s0) / nr * plan.b_panel + (kk - k0) / step * nr,
                                           plan.b_panel, nr);
              if (!private_direct) {
                C* const mine = sums != nullptr && job % plan.parts == 0 ? sums + l0 : nullptr;
                pack<A, T, mr>(g.a, l0, l1 - l0, kk, length, a_panels, plan.a_panel, mine);
              }
              a = plan.a_direct ? direct_view<A>(g.a, l0, kk, mr) : packed_view<A>(a_panels, plan.a_panel, mr);
            }
            const int64_t i0 = share_a ? t0 : l0, i1 = share_a ? t1 : l1, j0 = share_a ? l0 : t0,
                          j1 = share_a ? l1 : t1;
            multiply_block<P, T>(g.out, a, b, i0, i1, j0, j1, ceil_div(length, step), kk == 0, kk + length >= g.k,
                                 partial);
          }
          if (g.out.stream) finish_streams();
        });
        if (!stays) return;
      }
    }
  }
}

// B ahead of the product, for plans with b_packed.
template <class P, class T>
size_t packed_b_bytes(const Gemm<T>& g, const GemmPlan& plan) {
  if constexpr (Blocks<P>::all) {
    return packed_blocks_bytes<P>(g);
  } else {
    if constexpr (Blocks<P>::some)
      if (plan.blocked) return packed_blocks_bytes<P>(g);
    return aligned(ceil_div(g.n, Tile<P>::nr) * plan.b_panel * static_cast<int64_t>(sizeof(typename Tile<P>::B)));
  }
}
template <class P, class T>
void pack_b(const Gemm<T>& g, const GemmPlan& plan, void* to) {
  if constexpr (Blocks<P>::some)
    if (plan.blocked) return pack_blocks<P>(g, to);
  if constexpr (!Blocks<P>::all) {
    using B = typename Tile<P>::B;
    pack<B, T, Tile<P>::nr>(g.b, 0, g.n, 0, g.k, static_cast<B*>(to), plan.b_panel, nullptr);
  }
}

template <class P, class T>
void gemm(const Gemm<T>& g, const GemmPlan& plan, void* workspace, const Team& team) {
  unsigned char* const bytes = static_cast<unsigned char*>(workspace);
  if constexpr (Blocks<P>::some)
    if (plan.blocked)
      return parallel(team, plan.threads, [&](Crew& crew) { blocks_member<P, T>(g, plan, bytes, crew); });
  if constexpr (!Blocks<P>::all) {
    if (plan.tiny) return gemm_tiny<P, T>(g, plan);
    Gemm<T> product = g;
    product.out.stream = streams(g, plan);
    parallel(team, plan.threads, [&](Crew& crew) { gemm_member<P, T>(product, plan, bytes, crew); });
  }
}
