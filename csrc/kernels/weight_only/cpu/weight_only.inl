// Linear layers with weights of 8 or 4 bits, few rows and many. The contract is csrc/kernels/weight_only/weight_only.h.
//
// A vector of words is unpacked by shifts, so that its j-th vector of weights does not hold neighbours. x is widened
// and put into that order first, `block` elements at a time:
//   x[block][j][i] = x[block * kBlock + Words::index(i, j)]
// Weights are read once for kMostRows rows of x. For one row the kernel is bound by memory. For many rows,
// many_rows.inl unpacks them once for all.
#pragma once

#include "../../activation/cpu/rows.inl"
#include "../../common/cpu/common.inl"
#include "many_rows.inl"
#include "weight_formats.inl"

// Lane i is p[i >> shift]; of p, `count` elements may be read.
inline Vec<float> spread(const float* p, int shift, int count) {
#if defined(FASTOPS_VEC_AVX512)
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return {_mm512_permutexvar_ps(_mm512_srl_epi32(lanes, _mm_cvtsi32_si128(shift)), Vec<float>::load(p, count).v)};
#elif defined(FASTOPS_VEC_AVX2)
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return {_mm256_permutevar8x32_ps(Vec<float>::load(p, count).v, _mm256_srl_epi32(lanes, _mm_cvtsi32_si128(shift)))};
#else
  Vec<float> result;
  for (int i = 0; i < Vec<float>::size; ++i) result.v[i] = i >> shift < count ? p[i >> shift] : 0;
  return result;
#endif
}

// The groups of a row. Their sizes are powers of two, and so are those of blocks.
template <WeightFormat format>
struct Groups {
  using W = Words<format>;
  int64_t count;  // of a row
  int log = 0;    // a group has 2^log blocks; -1: a block has several groups
  int lanes = 0;  // which then have the elements of 2^lanes lanes

  explicit Groups(const WeightOnlyForward& call) : count(ceil_div(call.k, call.group)) {
    if (call.group >= call.k) {
      log = 62;
    } else if (call.group >= W::kBlock) {
      while (int64_t{W::kBlock} << log < call.group) ++log;
    } else {
      log = -1;
      while (int64_t{W::kPerWord} << lanes < call.group) ++lanes;
    }
  }
  // Of row `row` of a matrix with `count` columns: what the lanes of this block have.
  template <bool several>  // in a block
  Vec<float> of(const float* matrix, int64_t row, int64_t block) const {
    const float* const p = matrix + row * count;
    if constexpr (!several) return Vec<float>::set1(p[block >> log]);
    const int64_t first = block * (W::kLanes >> lanes);
    return spread(p + first, lanes, static_cast<int>(smaller<int64_t>(count - first, W::kLanes >> lanes)));
  }
};

// x in the order of the words, `blocks` blocks a row, zero behind k; behind each block the sum over j for each lane.
template <WeightFormat format>
constexpr int kOrdered = Words<format>::kBlock + Words<format>::kLanes;

template <WeightFormat format, class T>
void order_row(const T* x, int64_t k, int64_t blocks, float* to) {
  using W = Words<format>;
  for (int64_t b = 0; b < blocks; ++b, to += kOrdered<format>) {
    alignas(64) float values[W::kBlock];
    const int64_t left = k - b * W::kBlock;
    if (left < W::kBlock)
      for (int i = 0; i < W::kBlock; ++i) values[i] = 0;
    widen_row(x + b * W::kBlock, values, static_cast<int>(smaller<int64_t>(left, W::kBlock)));
    for (int i = 0; i < W::kLanes; ++i) {
      float sum = 0;
      for (int j = 0; j < W::kPerWord; ++j) {
        to[j * W::kLanes + i] = values[W::index(i, j)];
        sum += values[W::index(i, j)];
      }
      to[W::kBlock + i] = sum;
    }
  }
}

// The most rows of x at a time, and how many outputs together with them: accumulators and what is loaded fit the
// registers, and there are enough chains of multiply-adds.
#if defined(FASTOPS_32_REGISTERS)
constexpr int kMostRows = 8;
constexpr int kOutputsTogether[kMostRows + 1] = {0, 4, 4, 2, 2, 2, 2, 2, 2};
#else
constexpr int kMostRows = 4;
constexpr int kOutputsTogether[kMostRows + 1] = {0, 4, 2, 2, 2};
#endif
// With so few rows, sums of a block are scaled; with more, the weights are. Where such a sum overflows or is not a
// number, what it stands for need not: a unit of outputs that are not finite is computed again as with more rows.
constexpr int kLateRows = 2;
// Sums of so much of x, which stays in L1, before the next part of it.
constexpr int64_t kXBytes = 32 << 10;
constexpr int64_t kUnitOutputs = 32;  // of a unit of work

struct WeightOnlyPlan {
  int threads;
  int64_t blocks, slab;  // of k; rows of x that are in order at a time
  size_t sums_at, sums_bytes;
};

// body<j>() for each weight of a word.
template <WeightFormat format, class Body>
__attribute__((always_inline)) inline void for_each_weight(Body&& body) {
  body.template operator()<0>();
  body.template operator()<1>();
  body.template operator()<2>();
  body.template operator()<3>();
  if constexpr (Words<format>::kPerWord == 8) {
    body.template operator()<4>();
    body.template operator()<5>();
    body.template operator()<6>();
    body.template operator()<7>();
  }
}

// Partial sums of `rows` rows of x and of outputs n, n + 1 ... (the last one again behind n1), over blocks [b0, b1).
template <WeightFormat format, int rows, bool offset, bool several>
__attribute__((noinline)) void add_blocks(const Bound<WeightOnlyForward>& args, const Groups<format>& groups,
                                          const float* x, int64_t x_stride, int64_t n, int64_t n1, int64_t b0,
                                          int64_t b1, Vec<float>* partial) {
  using W = Words<format>;
  constexpr int outputs = kOutputsTogether[rows];
  Vec<float> sums[rows][outputs];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int o = 0; o < outputs; ++o) sums[r][o] = b0 == 0 ? Vec<float>::zero() : partial[r * outputs + o];
  const int64_t row_bytes = ceil_div(args.k * W::kBits, 8);
  const unsigned char* row[outputs];
  int64_t output[outputs];
  for (int o = 0; o < outputs; ++o) {
    output[o] = smaller(n + o, n1 - 1);
    row[o] = static_cast<const unsigned char*>(args.w) + output[o] * args.w_row_stride;
  }
  const auto add_block = [&](int64_t b, const Words<format>(&words)[outputs]) __attribute__((always_inline)) {
    const float* const block = x + b * kOrdered<format>;
    Vec<float> scale[outputs], shift[outputs];
#pragma GCC unroll 4
    for (int o = 0; o < outputs; ++o) {
      scale[o] = groups.template of<several>(args.scale, output[o], b);
      if constexpr (W::kUnit != 1) scale[o] = scale[o] * Vec<float>::set1(W::kUnit);
      shift[o] = offset ? groups.template of<several>(args.offset, output[o], b) : Vec<float>::zero();
    }
    if constexpr (rows <= kLateRows) {
      Vec<float> levels[rows][outputs];
#pragma GCC unroll 2
      for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int o = 0; o < outputs; ++o) levels[r][o] = Vec<float>::zero();
      for_each_weight<format>([&]<int j>() __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int o = 0; o < outputs; ++o) {
          const Vec<float> level = words[o].template get<j>();
#pragma GCC unroll 2
          for (int r = 0; r < rows; ++r)
            levels[r][o] = fma(Vec<float>::load(block + r * x_stride + j * W::kLanes), level, levels[r][o]);
        }
      });
#pragma GCC unroll 2
      for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int o = 0; o < outputs; ++o) {
          sums[r][o] = fma(levels[r][o], scale[o], sums[r][o]);
          if (offset) sums[r][o] = fma(Vec<float>::load(block + r * x_stride + W::kBlock), shift[o], sums[r][o]);
        }
    } else {
      for_each_weight<format>([&]<int j>() __attribute__((always_inline)) {
        Vec<float> weight[outputs];
#pragma GCC unroll 4
        for (int o = 0; o < outputs; ++o) {
          const Vec<float> level = words[o].template get<j>();
          weight[o] = offset ? fma(level, scale[o], shift[o]) : level * scale[o];
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
          const Vec<float> value = Vec<float>::load(block + r * x_stride + j * W::kLanes);
#pragma GCC unroll 4
          for (int o = 0; o < outputs; ++o) sums[r][o] = fma(value, weight[o], sums[r][o]);
        }
      });
    }
  };
  const int64_t whole = smaller(b1, row_bytes / W::kBytes);
  for (int64_t b = b0; b < whole; ++b) {
    Words<format> words[outputs];
#pragma GCC unroll 4
    for (int o = 0; o < outputs; ++o) {
      words[o] = W::load(row[o] + b * W::kBytes);
      // The next rows: these are too short for the processor to find out.
      __builtin_prefetch(row[o] + outputs * args.w_row_stride + b * W::kBytes);
    }
    add_block(b, words);
  }
  if (whole < b1) {
    alignas(64) unsigned char last[outputs][W::kBytes] = {};
    Words<format> words[outputs];
    for (int o = 0; o < outputs; ++o) {
      __builtin_memcpy(last[o], row[o] + whole * W::kBytes, static_cast<size_t>(row_bytes - whole * W::kBytes));
      words[o] = W::load(last[o]);
    }
    add_block(whole, words);
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int o = 0; o < outputs; ++o) partial[r * outputs + o] = sums[r][o];
}

template <WeightFormat format, bool offset>
struct RowsKernel {
  int outputs;
  void (*add)(const Bound<WeightOnlyForward>&, const Groups<format>&, const float* x, int64_t x_stride, int64_t n,
              int64_t n1, int64_t b0, int64_t b1, Vec<float>* partial);

  template <int rows>
  static RowsKernel of(bool several) {
    return {kOutputsTogether[rows],
            several ? add_blocks<format, rows, offset, true> : add_blocks<format, rows, offset, false>};
  }
  static RowsKernel find(int64_t rows, bool several) {
    return rows == 1   ? of<1>(several)
           : rows == 2 ? of<2>(several)
           : rows <= 4 ? of<4>(several)
                       : of<kMostRows>(several);
  }
};

template <WeightFormat format, bool offset, class T>
void weight_only_member(const Bound<WeightOnlyForward>& args, const WeightOnlyPlan& plan, unsigned char* workspace,
                        Crew& crew) {
  using V = Vec<float>;
  const Groups<format> groups(args);
  float* const x = reinterpret_cast<float*>(workspace);
  const int64_t x_stride = plan.blocks * kOrdered<format>;
  V* const partial =
      reinterpret_cast<V*>(workspace + plan.sums_at + static_cast<size_t>(crew.thread) * plan.sums_bytes);
  const ActivationKind kind = args.activation.kind;
  const auto f = kind != ActivationKind::identity ? row_forward<float>(kind) : nullptr;
  for (int64_t i0 = 0; i0 < args.m; i0 += plan.slab) {
    const int64_t rows = smaller(plan.slab, args.m - i0);
    // Rows that are not there are zero: the kernels for 4 and 8 rows read them.
    if (!crew.share(rows == 1 ? 1 : round_up(rows, kMostRows), [&](int64_t i) {
          float* const to = x + i * x_stride;
          if (i >= rows)
            for (int64_t p = 0; p < x_stride; ++p) to[p] = 0;
          else
            order_row<format>(static_cast<const T*>(args.x) + (i0 + i) * args.x_row_stride, args.k, plan.blocks, to);
        }))
      return;
    const bool stays = crew.share(ceil_div(args.n, kUnitOutputs), [&](int64_t unit) {
      const int64_t n0 = unit * kUnitOutputs, n1 = smaller(n0 + kUnitOutputs, args.n);
      for (int64_t i = 0; i < rows; i += kMostRows) {
        const int64_t high = smaller<int64_t>(kMostRows, rows - i);
        auto kernel = RowsKernel<format, offset>::find(high, groups.log < 0);
        const int64_t most =
            larger<int64_t>(1, kXBytes / (high * kOrdered<format> * static_cast<int64_t>(sizeof(float))));
        const auto add = [&] {
          for (int64_t b = 0; b < plan.blocks; b += most)
            for (int64_t n = n0; n < n1; n += kernel.outputs)
              kernel.add(args, groups, x + i * x_stride, x_stride, n, n1, b, smaller(b + most, plan.blocks),
                         partial + (n - n0) * kMostRows);
        };
        add();
        if (high <= kLateRows && plan.blocks > 0) {
          V finite = V::zero();  // or NaN
          for (int64_t n = n0; n < n1; n += kernel.outputs)
            for (int64_t v = 0; v < high * kernel.outputs; ++v) {
              const V sum = partial[(n - n0) * kMostRows + v];
              finite = finite + (sum - sum);
            }
          if (reduce_add(finite) != 0) {
            kernel = RowsKernel<format, offset>::template of<kLateRows + 2>(groups.log < 0);
            add();  // rows behind these may hold anything
          }
        }
        for (int64_t r = 0; r < high; ++r) {
          alignas(64) float row[kUnitOutputs];
          const int count = static_cast<int>(n1 - n0);
          for (int n = 0; n < count; ++n) {
            const int in_group = n % kernel.outputs;
            row[n] =
                plan.blocks > 0 ? reduce_add(partial[(n - in_group) * kMostRows + r * kernel.outputs + in_group]) : 0;
            if (args.bias != nullptr) row[n] += load_one(static_cast<const T*>(args.bias) + n0 + n);
          }
          if (f != nullptr) f(row, row, count, args.activation);
          store_row<T>(row, static_cast<T*>(args.y) + (i0 + i + r) * args.y_row_stride + n0, count);
        }
      }
    });
    if (!stays) return;
  }
}

// Rows of x are put in order in this many bytes at a time.
constexpr int64_t kOrderedBytes = 4 << 20;

template <WeightFormat format, bool offset, class T>
void plan_weight_only(Plan<WeightOnlyForward>& plan) {
  const WeightOnlyForward& call = plan.call;
  WeightOnlyPlan how{};
  const double work = 2.0 * static_cast<double>(call.m) * static_cast<double>(call.n) * static_cast<double>(call.k);
  how.threads = static_cast<int>(smaller(static_cast<double>(plan.target.threads), larger(1.0, work / kFlopPerThread)));
  how.blocks = ceil_div(call.k, Words<format>::kBlock);
  const int64_t row = larger<int64_t>(how.blocks, 1) * kOrdered<format> * static_cast<int64_t>(sizeof(float));
  how.slab = smaller(round_up(call.m, kMostRows), round_up(larger<int64_t>(1, kOrderedBytes / row), kMostRows));
  how.sums_at = aligned(how.slab * row);
  how.sums_bytes = aligned(kUnitOutputs * kMostRows * static_cast<int64_t>(sizeof(Vec<float>)));
  decide(plan, {kWeightNames<format>.few, {kMostRows, kOutputsTogether[kMostRows]}},
         how.sums_at + static_cast<size_t>(how.threads) * how.sums_bytes, how,
         [](auto& args, auto& how, auto* workspace, auto& team) {
           parallel(team, how.threads, [&](Crew& crew) {
             weight_only_member<format, offset, T>(args, how, static_cast<unsigned char*>(workspace), crew);
           });
         });
}

void plan_call(Plan<WeightOnlyForward>& plan) {
  const WeightOnlyForward& call = plan.call;
  if (call.m == 0 || call.n == 0) return decide_nothing(plan);
  with_dtype(call.dtype, [&]<class T>(T) {
    const auto decide_for = [&]<WeightFormat format, bool offset>() {
      takes_many_rows(call) ? plan_many_rows<format, offset, T>(plan) : plan_weight_only<format, offset, T>(plan);
    };
    if constexpr (!same_type<T, double>) {
      if (call.format == WeightFormat::float8)
        decide_for.template operator()<WeightFormat::float8, false>();
      else if (call.format == WeightFormat::int8)
        call.with_offset ? decide_for.template operator()<WeightFormat::int8, true>()
                         : decide_for.template operator()<WeightFormat::int8, false>();
      else
        call.with_offset ? decide_for.template operator()<WeightFormat::uint4, true>()
                         : decide_for.template operator()<WeightFormat::uint4, false>();
    }
  });
}
