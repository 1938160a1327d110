// Many rows of x by weights of 8 or 4 bits: an ordinary product, of panels that are made of the weights as it goes.
//
// x is packed once, some rows at a time. A member takes the next outputs, unpacks their weights into panels of its own,
// one block of k after the other, and multiplies all of these rows by it. Each element is one chain of multiply-adds in
// a block of k, and blocks are added in order: the result depends on the shape alone.
#pragma once

#include "../../common/cpu/common.inl"
#include "../../gemm/cpu/gemm.inl"
#include "weight_formats.inl"

struct WeightNames {
  const char *few, *many;
};
template <WeightFormat format>
constexpr WeightNames kWeightNames =
    format == WeightFormat::int8    ? WeightNames{"dot_int8_weight", "gemm_int8_weight"}
    : format == WeightFormat::uint4 ? WeightNames{"dot_int4_weight", "gemm_int4_weight"}
                                    : WeightNames{"dot_fp8_weight", "gemm_fp8_weight"};

// From this many rows on. Unpacking takes as long as multiplying 10 to 16 rows. 4096 x 1024, 4 bits and 8, us, one
// thread, Zen 5, rows as they are and unpacked: 16 rows 878 and 928, 869 and 959; 32 rows 1710 and 1440, 1686 and 1514.
constexpr int64_t kManyRows = 24;
constexpr int64_t kRowSlabBytes = 8 << 20;  // of packed rows of x
constexpr int64_t kUnpackedStrip = 128;     // outputs of a unit, at most: with a block of k 256 KB, in L2
using WeightTile = Tile<float>;

inline bool takes_many_rows(const WeightOnlyForward& call) { return call.m >= kManyRows && call.k > 0; }

struct ManyRowsPlan {
  // What unpacks the weights into a panel; all else is the same for every format.
  void (*unpack)(const Bound<WeightOnlyForward>&, int64_t n0, int outputs, int64_t k0, int64_t k1, float* panel);
  int threads;
  int64_t slab, strip;  // rows of x, outputs
  size_t x_bytes, bias_bytes, panel_bytes, sums_bytes;
};

// panel[(p - k0) nr + l] = W[n0 + l, p] for l < outputs and p in [k0, k1), zero for other l < nr.
template <WeightFormat format, bool offset>
void unpack_panel(const Bound<WeightOnlyForward>& args, int64_t n0, int outputs, int64_t k0, int64_t k1, float* panel) {
  using W = Words<format>;
  using V = Vec<float>;
  constexpr int S = V::size, nr = WeightTile::nr;
  const int64_t groups = ceil_div(args.k, args.group), row_bytes = ceil_div(args.k * W::kBits, 8);
  for (int l = 0; l < nr; l += S)
    for (int64_t p = k0; p < k1; p += S) {
      const int count = static_cast<int>(smaller<int64_t>(k1 - p, S));
      const int64_t group = p / args.group, byte = p * W::kBits / 8, whole = byte + S * W::kBits / 8;
      V r[S];
#pragma GCC unroll 16
      for (int i = 0; i < S; ++i) {
        r[i] = V::zero();
        if (l + i >= outputs) continue;
        const int64_t n = n0 + l + i;
        const unsigned char* at = static_cast<const unsigned char*>(args.w) + n * args.w_row_stride + byte;
        unsigned char last[S] = {};
        if (whole > row_bytes) {
          __builtin_memcpy(last, at, static_cast<size_t>(row_bytes - byte));
          at = last;
        }
        const V scale = V::set1(args.scale[n * groups + group] * W::kUnit);
        const V level = W::in_order(at);
        r[i] = offset ? fma(level, scale, V::set1(args.offset[n * groups + group])) : level * scale;
      }
      transpose(r);
      float* const to = panel + (p - k0) * nr + l;
#pragma GCC unroll 16
      for (int i = 0; i < S; ++i)
        if (i < count) r[i].store(to + i * nr);
    }
}

template <class T>
void many_rows_member(const Bound<WeightOnlyForward>& args, const ManyRowsPlan& plan, unsigned char* workspace,
                      Crew& crew) {
  constexpr int64_t mr = WeightTile::mr, nr = WeightTile::nr, kc = WeightTile::blocking.kc;
  float* const x = reinterpret_cast<float*>(workspace);
  float* const bias = reinterpret_cast<float*>(workspace + plan.x_bytes);
  unsigned char* const own = workspace + plan.x_bytes + plan.bias_bytes +
                             static_cast<size_t>(crew.thread) * (plan.panel_bytes + plan.sums_bytes);
  float* const panels = reinterpret_cast<float*>(own);
  float* const sums = plan.sums_bytes > 0 ? reinterpret_cast<float*>(own + plan.panel_bytes) : nullptr;
  const ActivationKind kind = args.activation.kind;
  const Rectifier relu = product_rectifier<T>(args.activation, nullptr);
  Output<T> out{
      static_cast<T*>(args.y), args.y_row_stride, nullptr, args.bias != nullptr ? bias : nullptr, relu, nullptr,
      args.activation};
  if (!relu && kind != ActivationKind::identity) out.f = row_forward<T>(kind);
  const Source<T> source = plain_source(static_cast<const T*>(args.x), args.x_row_stride, 1);
  for (int64_t i0 = 0; i0 < args.m; i0 += plan.slab) {
    const int64_t i1 = smaller(i0 + plan.slab, args.m), packs = ceil_div(i1 - i0, mr);
    // The bias is a unit of its own.
    const bool packed = crew.share(packs + 1, [&](int64_t unit) {
      if (unit == packs) {
        if (args.bias != nullptr && i0 == 0)
          for (int64_t n = 0; n < args.n; n += kUnpackedStrip)
            widen_row(static_cast<const T*>(args.bias) + n, bias + n,
                      static_cast<int>(smaller(kUnpackedStrip, args.n - n)));
        return;
      }
      const int64_t i = i0 + unit * mr;
      pack<float, T, static_cast<int>(mr)>(source, i, smaller(mr, i1 - i), 0, args.k, x + unit * mr * args.k, 0,
                                           nullptr);
    });
    if (!packed) return;
    const bool stays = crew.share(ceil_div(args.n, plan.strip), [&](int64_t unit) {
      const int64_t j0 = unit * plan.strip, j1 = smaller(j0 + plan.strip, args.n);
      for (int64_t k0 = 0; k0 < args.k; k0 += kc) {
        const int64_t k1 = smaller(k0 + kc, args.k), length = k1 - k0;
        for (int64_t j = j0; j < j1; j += nr)
          plan.unpack(args, j, static_cast<int>(smaller(nr, j1 - j)), k0, k1, panels + (j - j0) * length);
        multiply_block<float, T>(out, packed_view<float>(x + k0 * mr, mr * args.k, static_cast<int>(mr)),
                                 packed_view<float>(panels, nr * length, static_cast<int>(nr)), i0, i1, j0, j1, length,
                                 k0 == 0, k1 == args.k, {sums, plan.strip, i0, j0});
      }
    });
    if (!stays) return;
  }
}

template <WeightFormat format, bool offset, class T>
void plan_many_rows(Plan<WeightOnlyForward>& plan) {
  constexpr int64_t mr = WeightTile::mr, nr = WeightTile::nr, kFloat = sizeof(float);
  const WeightOnlyForward& call = plan.call;
  ManyRowsPlan how{};
  how.unpack = unpack_panel<format, offset>;
  const double work = 2.0 * static_cast<double>(call.m) * static_cast<double>(call.n) * static_cast<double>(call.k);
  how.threads = static_cast<int>(smaller(static_cast<double>(plan.target.threads), larger(1.0, work / kFlopPerThread)));
  how.slab = smaller(round_up(call.m, mr), round_up(larger<int64_t>(kRowSlabBytes / (call.k * kFloat), 1), mr));
  how.strip = smaller(kUnpackedStrip, round_up(ceil_div(call.n, 4 * how.threads), nr));
  how.x_bytes = aligned(how.slab * call.k * kFloat);
  how.bias_bytes = aligned(call.with_bias ? call.n * kFloat : 0);
  how.panel_bytes = aligned(how.strip * smaller(WeightTile::blocking.kc, call.k) * kFloat);
  how.sums_bytes = aligned(same_type<T, float> ? 0 : how.slab * how.strip * kFloat);
  decide(plan, {kWeightNames<format>.many, {static_cast<int>(mr), static_cast<int>(nr)}},
         how.x_bytes + how.bias_bytes + static_cast<size_t>(how.threads) * (how.panel_bytes + how.sums_bytes), how,
         [](auto& args, auto& how, auto* workspace, auto& team) {
           parallel(team, how.threads,
                    [&](Crew& crew) { many_rows_member<T>(args, how, static_cast<unsigned char*>(workspace), crew); });
         });
}
