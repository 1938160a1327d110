// attention_forward and attention_backward.
//
// A thread computes whole heads. It packs K and V of a head once, as panels of the matrix product, and goes through the
// queries in blocks. For a block, the scores of kKeyBlock keys at a time are computed, turned into probabilities where
// they lie, and multiplied by V; the block's running maxima and sums rescale what there is (Milakov and Gimelshein).
// Backward computes the probabilities again. With `causal`, keys behind a block's last query are left out.
//
// 16-bit operands are widened as they are packed, or into a copy of a block's rows; results are summed in float32 and
// rounded once.
#pragma once

#include "../../common/cpu/common.inl"
#include "../../common/cpu/elements.inl"
#include "../../common/cpu/some.inl"
#include "../../gemm/cpu/microkernels.inl"
#include "../../gemm/cpu/pack.inl"
#include "../../softmax/cpu/rows.inl"

// Queries and keys of a block: its scores, 96 KB in float32, stay in L2 beside the head's panels, and those of most
// image models are one block. Backward's products sum over the queries of a block, and want it longer.
constexpr int64_t kQueryBlock = 4 * kMr, kGradientQueries = 8 * kMr, kKeyBlock = 512;

template <class C>
inline C* panels_at(char*& at, int64_t lanes, int64_t k) {
  C* const result = reinterpret_cast<C*>(at);
  at += aligned(round_up(lanes, kNr<C>) * k * static_cast<int64_t>(sizeof(C)));
  return result;
}

// The scratch memory of a thread.
template <class T>
struct AttentionScratch {
  using C = Compute<T>;
  static constexpr bool kWidens = !__is_same(T, C);
  C *q_rows, *y_rows;                                     // a block's, of 16-bit types; y is grad_y for backward
  C *grad_q_rows, *grad_k_rows, *grad_v_rows;             // their gradients: of a block's queries, of all keys
  C *k_by_keys, *v_by_size;                               // forward: panels of K, lanes are keys, and of V
  C *k_by_size, *v_by_keys, *q_by_size, *grad_y_by_size;  // backward
  C *scores, *grad_scores;                                // of a block: rows are `row` apart
  C *most, *sum, *factor, *dots;                          // of each query of a block
  int64_t row;
  size_t bytes;

  AttentionScratch(const AttentionShape& s, bool backward, void* start) {
    char* at = static_cast<char*>(start);
    char* const begin = at;
    const int64_t queries = backward ? kGradientQueries : kQueryBlock;
    q_rows = kWidens ? panels_at<C>(at, s.size, queries) : nullptr;
    y_rows = kWidens ? panels_at<C>(at, s.value_size, queries) : nullptr;
    grad_q_rows = kWidens && backward ? panels_at<C>(at, s.size, queries) : nullptr;
    grad_k_rows = kWidens && backward ? panels_at<C>(at, s.size, s.keys) : nullptr;
    grad_v_rows = kWidens && backward ? panels_at<C>(at, s.value_size, s.keys) : nullptr;
    k_by_keys = panels_at<C>(at, s.keys, s.size);
    v_by_size = backward ? nullptr : panels_at<C>(at, s.value_size, s.keys);
    k_by_size = backward ? panels_at<C>(at, s.size, s.keys) : nullptr;
    v_by_keys = backward ? panels_at<C>(at, s.keys, s.value_size) : nullptr;
    q_by_size = backward ? panels_at<C>(at, s.size, s.queries) : nullptr;
    grad_y_by_size = backward ? panels_at<C>(at, s.value_size, s.queries) : nullptr;
    // Not a multiple of 4 KB, so that rows do not fall into the same sets of L1.
    row = round_up(smaller(s.keys, kKeyBlock), kNr<C>) + Vec<C>::size;
    scores = panels_at<C>(at, row, queries);
    grad_scores = backward ? panels_at<C>(at, row, queries) : nullptr;
    most = panels_at<C>(at, queries, 1);
    sum = panels_at<C>(at, queries, 1);
    factor = panels_at<C>(at, queries, 1);
    dots = panels_at<C>(at, queries, 1);
    bytes = static_cast<size_t>(at - begin);
  }
};

// to[i, j] (+)= sum_p a[i, p] b[p, j], i < m, j < n, for a with any strides and b in panels whose k is `panel` long, of
// which [first, first + k) is summed. first_lane, a multiple of kNr, is the panels' first column.
template <class C>
inline void multiply(int64_t m, int64_t n, int64_t k, const C* a, int64_t a_rs, int64_t a_ks, const C* b, int64_t panel,
                     int64_t first, int64_t first_lane, C* to, int64_t to_rs, bool add) {
  for (int64_t j = 0; j < n; j += kNr<C>)
    for (int64_t i = 0; i < m; i += kMr) {
      TileOut<C> out{};
      out.c = to + i * to_rs + j;
      out.c_rs = to_rs;
      out.prev = add ? out.c : nullptr;
      out.prev_rs = to_rs;
      micro_tile(k, a + i * a_rs, a_rs, a_ks, b + (first_lane + j) * panel + first * kNr<C>, kNr<C>,
                 static_cast<int>(smaller(kMr, m - i)), static_cast<int>(smaller(kNr<C>, n - j)), out);
    }
}

template <class T>
inline const T* head_of(const void* p, const HeadStrides& s, int64_t batch, int64_t head) {
  return static_cast<const T*>(p) + batch * s.batch + head * s.head;
}
template <class T>
inline T* head_of(void* p, const HeadStrides& s, int64_t batch, int64_t head) {
  return static_cast<T*>(p) + batch * s.batch + head * s.head;
}

template <class T>
inline T* head_or_null(void* p, const HeadStrides& s, int64_t batch, int64_t head) {
  return p == nullptr ? nullptr : head_of<T>(p, s, batch, head);
}

// Panels of a matrix [rows, size] whose lanes are its rows, or its columns.
template <class T, class C>
inline void pack_rows(const T* from, int64_t row, int64_t rows, int64_t size, C* to) {
  pack<C, T, kNr<C>>(plain_source(from, row, 1), 0, rows, 0, size, to, kNr<C> * size, nullptr);
}
template <class T, class C>
inline void pack_columns(const T* from, int64_t row, int64_t rows, int64_t size, C* to) {
  pack<C, T, kNr<C>>(plain_source(from, 1, row), 0, size, 0, rows, to, kNr<C> * rows, nullptr);
}

// Rows in the compute type.
template <class P>
struct RowsAt {
  P* data;
  int64_t stride;
  P* row(int64_t i) const { return data + i * stride; }
};
// Those of an operand: where they lie, or, of a 16-bit type, widened into `copy`.
template <class T, class C>
inline RowsAt<const C> widened(const T* from, int64_t row, int64_t rows, int64_t size, C* copy) {
  if constexpr (__is_same(T, C)) {
    return {from, row};
  } else {
    for (int64_t i = 0; i < rows; ++i) widen_row(from + i * row, copy + i * size, static_cast<int>(size));
    return {copy, size};
  }
}
// Those of a result: where they lie, or, of a 16-bit type, in `copy`, from which `narrow_rows` rounds them.
template <class T, class C>
inline RowsAt<C> summed(T* to, int64_t row, int64_t size, C* copy) {
  if constexpr (__is_same(T, C))
    return {to, row};
  else
    return {copy, size};
}
template <class T, class C>
inline void narrow_rows(const RowsAt<C>& from, T* to, int64_t row, int64_t rows, int64_t size) {
  if constexpr (!__is_same(T, C))
    for (int64_t i = 0; i < rows; ++i) store_row<T>(from.row(i), to + i * row, static_cast<int>(size));
}

// row[j] = exp(scale row[j] + mask[j] - base) for j < count, with base the largest of those and `before`, which is
// replaced by it; 0 where all is -inf. Returns the sum.
template <class T, class C>
inline C exp_row(C* row, const T* mask, int64_t count, C scale, C& before) {
  using V = Vec<C>;
  const V times = V::set1(scale);
  V most = V::set1(before);
  for (int64_t j = 0; j < count; j += V::size) {
    const int64_t left = count - j;
    V t = load_upto<V>(row + j, left) * times;
    if (mask != nullptr) t = t + load_upto<V>(mask + j, left);
    t.store(row + j);
    const V larger = max(t, most);
    most = left >= V::size ? larger : select(Mask<C>::from_bits((1u << left) - 1), larger, most);
  }
  before = reduce_max(most);
  const V base = before == -static_cast<C>(__builtin_inf()) ? V::zero() : V::set1(before);
  V sum = V::zero();
  for (int64_t j = 0; j < count; j += V::size) {
    const V e = weight_of<C>(V::load(row + j) - base);
    e.store(row + j);
    sum = sum + (count - j >= V::size ? e : select(Mask<C>::from_bits((1u << (count - j)) - 1), e, V::zero()));
  }
  return reduce_add(sum);
}

template <class C>
inline void zero_row(C* row, int64_t first, int64_t last) {
  for (int64_t j = first; j < last; ++j) row[j] = 0;
}

// The keys that a query sees of those in [first, first + count).
inline int64_t seen(const AttentionShape& s, int64_t query, int64_t first, int64_t count) {
  return s.causal ? smaller(larger<int64_t>(query + 1 - first, 0), count) : count;
}

// body(batch, head, index) for the heads of a thread.
template <class T, class Body>
inline void for_heads(const AttentionShape& s, bool backward, void* workspace, const Team& team, int threads,
                      Body body) {
  const int64_t count = s.batch * s.heads;
  const int64_t work = count * s.queries * s.keys * (s.size + s.value_size) * 2;
  const int wanted = static_cast<int>(smaller(smaller(work / kFlopPerThread + 1, count), threads));
  const size_t bytes = AttentionScratch<T>(s, backward, planned_address(64)).bytes;
  parallel(team, wanted, [&](Crew& crew) {
    AttentionScratch<T> scratch(s, backward, static_cast<char*>(workspace) + static_cast<size_t>(crew.thread) * bytes);
    crew.each(count, [&](int64_t i) { body(scratch, i / s.heads, i % s.heads, i); });
  });
}

template <class T>
void attention_forward(const Bound<AttentionForward>& args, void* workspace, const Team& team) {
  using C = Compute<T>;
  using V = Vec<C>;
  const AttentionShape& s = args.attention;
  const C scale = static_cast<C>(s.scale);
  for_heads<T>(s, false, workspace, team, args.threads, [&](auto& t, int64_t batch, int64_t head, int64_t index) {
    const T* const q = head_of<T>(args.q, s.q, batch, head);
    const T* const mask = s.with_mask ? head_of<T>(args.mask, s.mask, batch, head) : nullptr;
    T* const y = head_of<T>(args.y, s.y, batch, head);
    pack_rows(head_of<T>(args.k, s.k, batch, head), s.k.row, s.keys, s.size, t.k_by_keys);
    pack_columns(head_of<T>(args.v, s.v, batch, head), s.v.row, s.keys, s.value_size, t.v_by_size);
    for (int64_t i0 = 0; i0 < s.queries; i0 += kQueryBlock) {
      const int64_t rows = smaller(kQueryBlock, s.queries - i0);
      const int64_t end = s.causal ? smaller(s.keys, i0 + rows) : s.keys;
      const auto q_rows = widened(q + i0 * s.q.row, s.q.row, rows, s.size, t.q_rows);
      const auto y_rows = summed(y + i0 * s.y.row, s.y.row, s.value_size, t.y_rows);
      for (int64_t i = 0; i < rows; ++i) t.most[i] = -static_cast<C>(__builtin_inf()), t.sum[i] = 0;
      for (int64_t j0 = 0; j0 < end; j0 += kKeyBlock) {
        const int64_t columns = smaller(kKeyBlock, end - j0);
        multiply(rows, columns, s.size, q_rows.data, q_rows.stride, int64_t{1}, t.k_by_keys, s.size, int64_t{0}, j0,
                 t.scores, t.row, false);
        for (int64_t i = 0; i < rows; ++i) {
          C* const row = t.scores + i * t.row;
          const int64_t count = seen(s, i0 + i, j0, columns);
          const C before = t.most[i];
          const C sum =
              exp_row(row, mask == nullptr ? nullptr : mask + (i0 + i) * s.mask.row + j0, count, scale, t.most[i]);
          zero_row(row, count, columns);
          if (j0 == 0 || before == t.most[i]) {
            t.sum[i] = t.sum[i] + sum;
            continue;
          }
          const V factor = weight_of<C>(V::set1(before) - V::set1(t.most[i]));
          C lane;
          factor.store(&lane, 1);
          t.sum[i] = t.sum[i] * lane + sum;
          C* const to = y_rows.row(i);
          for (int64_t j = 0; j < s.value_size; j += V::size)
            store_upto(load_upto<V>(to + j, s.value_size - j) * factor, to + j, s.value_size - j);
        }
        multiply(rows, s.value_size, columns, static_cast<const C*>(t.scores), t.row, int64_t{1}, t.v_by_size, s.keys,
                 j0, int64_t{0}, y_rows.data, y_rows.stride, j0 > 0);
      }
      for (int64_t i = 0; i < rows; ++i) {
        const C sum = t.sum[i];
        const V factor = V::set1(sum == 0 ? C(0) : 1 / sum);
        C* const to = y_rows.row(i);
        for (int64_t j = 0; j < s.value_size; j += V::size)
          store_upto(load_upto<V>(to + j, s.value_size - j) * factor, to + j, s.value_size - j);
        if (args.lse == nullptr) continue;
        const V lse = sum == 0 ? lowest<C>() : V::set1(t.most[i]) + log_of(V::set1(sum));
        lse.store(static_cast<C*>(args.lse) + index * s.queries + i0 + i, 1);
      }
      narrow_rows(y_rows, y + i0 * s.y.row, s.y.row, rows, s.value_size);
    }
  });
}

// row[j] becomes P and grad_row[j] scale P (grad_row[j] - dot), for j < count.
template <class T, class C>
inline void gradient_row(C* row, C* grad_row, const T* mask, int64_t count, C scale, C lse, C dot) {
  using V = Vec<C>;
  const V times = V::set1(scale), of_y = V::set1(dot);
  const V base = lse == -static_cast<C>(__builtin_inf()) ? V::zero() : V::set1(lse);
  for (int64_t j = 0; j < count; j += V::size) {
    V t = V::load(row + j) * times;
    if (mask != nullptr) t = t + load_upto<V>(mask + j, count - j);
    const V p = weight_of<C>(t - base);
    p.store(row + j);
    ((V::load(grad_row + j) - of_y) * p * times).store(grad_row + j);
  }
}

template <class T>
void attention_backward(const Bound<AttentionBackward>& args, void* workspace, const Team& team) {
  using C = Compute<T>;
  using V = Vec<C>;
  const AttentionShape& s = args.attention;
  const C scale = static_cast<C>(s.scale);
  const int64_t g_row = args.grad_y_strides.row;
  for_heads<T>(s, true, workspace, team, args.threads, [&](auto& t, int64_t batch, int64_t head, int64_t index) {
    const T* const q = head_of<T>(args.q, s.q, batch, head);
    const T* const k = head_of<T>(args.k, s.k, batch, head);
    const T* const y = head_of<T>(args.y, s.y, batch, head);
    const T* const grad_y = head_of<T>(args.grad_y, args.grad_y_strides, batch, head);
    const T* const mask = s.with_mask ? head_of<T>(args.mask, s.mask, batch, head) : nullptr;
    const C* const lse = static_cast<const C*>(args.lse) + index * s.queries;
    T* const grad_q = head_or_null<T>(args.grad_q, args.grad_q_strides, batch, head);
    T* const grad_k = head_or_null<T>(args.grad_k, args.grad_k_strides, batch, head);
    T* const grad_v = head_or_null<T>(args.grad_v, args.grad_v_strides, batch, head);
    const auto grad_k_rows = summed(grad_k, args.grad_k_strides.row, s.size, t.grad_k_rows);
    const auto grad_v_rows = summed(grad_v, args.grad_v_strides.row, s.value_size, t.grad_v_rows);
    pack_rows(k, s.k.row, s.keys, s.size, t.k_by_keys);
    pack_rows(head_of<T>(args.v, s.v, batch, head), s.v.row, s.keys, s.value_size, t.v_by_keys);
    if (grad_q != nullptr) pack_columns(k, s.k.row, s.keys, s.size, t.k_by_size);
    if (grad_k != nullptr) pack_columns(q, s.q.row, s.queries, s.size, t.q_by_size);
    if (grad_v != nullptr) pack_columns(grad_y, g_row, s.queries, s.value_size, t.grad_y_by_size);
    for (int64_t j = 0; j < s.keys; ++j) {
      if (grad_k != nullptr) zero_row(grad_k_rows.row(j), 0, s.size);
      if (grad_v != nullptr) zero_row(grad_v_rows.row(j), 0, s.value_size);
    }
    for (int64_t i0 = 0; i0 < s.queries; i0 += kGradientQueries) {
      const int64_t rows = smaller(kGradientQueries, s.queries - i0);
      const int64_t end = s.causal ? smaller(s.keys, i0 + rows) : s.keys;
      const auto q_rows = widened(q + i0 * s.q.row, s.q.row, rows, s.size, t.q_rows);
      const auto g_rows = widened(grad_y + i0 * g_row, g_row, rows, s.value_size, t.y_rows);
      const auto grad_q_rows = summed(grad_q == nullptr ? grad_q : grad_q + i0 * args.grad_q_strides.row,
                                      args.grad_q_strides.row, s.size, t.grad_q_rows);
      for (int64_t i = 0; i < rows; ++i) {
        const T* const one = y + (i0 + i) * s.y.row;
        const C* const two = g_rows.row(i);
        V sum = V::zero();
        for (int64_t j = 0; j < s.value_size; j += V::size)
          sum = fma(load_upto<V>(one + j, s.value_size - j), load_upto<V>(two + j, s.value_size - j), sum);
        t.dots[i] = reduce_add(sum);
      }
      for (int64_t j0 = 0; j0 < end; j0 += kKeyBlock) {
        const int64_t columns = smaller(kKeyBlock, end - j0);
        multiply(rows, columns, s.size, q_rows.data, q_rows.stride, int64_t{1}, t.k_by_keys, s.size, int64_t{0}, j0,
                 t.scores, t.row, false);
        multiply(rows, columns, s.value_size, g_rows.data, g_rows.stride, int64_t{1}, t.v_by_keys, s.value_size,
                 int64_t{0}, j0, t.grad_scores, t.row, false);
        for (int64_t i = 0; i < rows; ++i) {
          C *const row = t.scores + i * t.row, *const grad_row = t.grad_scores + i * t.row;
          const int64_t count = seen(s, i0 + i, j0, columns);
          gradient_row(row, grad_row, mask == nullptr ? nullptr : mask + (i0 + i) * s.mask.row + j0, count, scale,
                       lse[i0 + i], t.dots[i]);
          zero_row(row, count, columns);
          zero_row(grad_row, count, columns);
        }
        const C *const p = t.scores, *const d = t.grad_scores;
        if (grad_v != nullptr)
          multiply(columns, s.value_size, rows, p, int64_t{1}, t.row, t.grad_y_by_size, s.queries, i0, int64_t{0},
                   grad_v_rows.row(j0), grad_v_rows.stride, true);
        if (grad_k != nullptr)
          multiply(columns, s.size, rows, d, int64_t{1}, t.row, t.q_by_size, s.queries, i0, int64_t{0},
                   grad_k_rows.row(j0), grad_k_rows.stride, true);
        if (grad_q != nullptr)
          multiply(rows, s.size, columns, d, t.row, int64_t{1}, t.k_by_size, s.keys, j0, int64_t{0}, grad_q_rows.data,
                   grad_q_rows.stride, j0 > 0);
      }
      if (grad_q != nullptr)
        narrow_rows(grad_q_rows, grad_q + i0 * args.grad_q_strides.row, args.grad_q_strides.row, rows, s.size);
    }
    if (grad_k != nullptr) narrow_rows(grad_k_rows, grad_k, args.grad_k_strides.row, s.keys, s.size);
    if (grad_v != nullptr) narrow_rows(grad_v_rows, grad_v, args.grad_v_strides.row, s.keys, s.value_size);
  });
}

void plan_call(Plan<AttentionForward>& plan) {
  with_dtype(plan.call.dtype, [&](auto type) {
    using T = decltype(type);
    const size_t bytes = AttentionScratch<T>(plan.call.attention, false, planned_address(64)).bytes;
    decide(plan, {"attention", {kMr, kNr<Compute<T>>}}, bytes * static_cast<size_t>(plan.target.threads),
           [](auto& args, auto* workspace, auto& team) { attention_forward<T>(args, workspace, team); });
  });
}

void plan_call(Plan<AttentionBackward>& plan) {
  with_dtype(plan.call.dtype, [&](auto type) {
    using T = decltype(type);
    const size_t bytes = AttentionScratch<T>(plan.call.attention, true, planned_address(64)).bytes;
    decide(plan, {"attention", {kMr, kNr<Compute<T>>}}, bytes * static_cast<size_t>(plan.target.threads),
           [](auto& args, auto* workspace, auto& team) { attention_backward<T>(args, workspace, team); });
  });
}
