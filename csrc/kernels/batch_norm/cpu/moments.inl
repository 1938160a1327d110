// Mean and variance of every channel, in one pass over x.
//
// A block's deviations from a shift, the mean of all blocks before it, and their squares are summed in the compute
// type, and the blocks are joined in float64 (Chan, Golub, LeVeque). A shift that is far from the block's mean costs no
// accuracy: the variance is then at least as large as the square of that distance, weighted by the block. The first
// block is summed twice, first for its shift.
#pragma once

#include "walk.inl"

struct Moments {
  double count = 0, mean = 0, squares = 0;  // squares: of the deviations from the mean
};

// `sum` and `squares` are those of the deviations of `count` more values from `shift`.
inline void join(Moments& m, double count, double shift, double sum, double squares) {
  const double difference = shift + sum / count - m.mean, both = m.count + count;
  m.squares += squares - sum * sum / count + difference * difference * (m.count * count / both);
  m.mean += difference * (count / both);
  m.count = both;
}

template <class C>
struct PlaneSums {
  Vec<C> a[4], b[4];
  PlaneSums() {
    for (int i = 0; i < 4; ++i) a[i] = b[i] = Vec<C>::zero();
  }
  double first() const { return reduce_add((a[0] + a[1]) + (a[2] + a[3])); }
  double second() const { return reduce_add((b[0] + b[1]) + (b[2] + b[3])); }
};

// body(vector's first element, its elements, accumulator) for all vectors of a row of n.
template <class C, class Body>
inline void for_vectors(int64_t n, Body body) {
  constexpr int size = Vec<C>::size;
  int64_t i = 0;
  for (; i + 4 * size <= n; i += 4 * size)
    for (int k = 0; k < 4; ++k) body(i + k * size, Fixed<size>{}, k);
  for (; i + size <= n; i += size) body(i, Fixed<size>{}, 0);
  if (i < n) body(i, static_cast<int>(n - i), 1);
}
template <class C, class T, int n>
inline Vec<C> load_vector(const T* p, Fixed<n>) {
  return Vec<C>::load(p);
}
template <class C, class T>
inline Vec<C> load_vector(const T* p, int count) {
  return Vec<C>::load(p, count);
}
template <class C, class T, int n>
inline void store_vector(Vec<C> v, T* p, Fixed<n>) {
  v.store(p);
}
template <class C, class T>
inline void store_vector(Vec<C> v, T* p, int count) {
  v.store(p, count);
}
template <class C, int n>
inline Vec<C> first_lanes(Vec<C> v, Fixed<n>) {
  return v;
}
template <class C>
inline Vec<C> first_lanes(Vec<C> v, int count) {
  return select(Mask<C>::from_bits((1u << count) - 1), v, Vec<C>::zero());
}

// As PyTorch's own, for values whose squares overflow the compute type, infinities and NaN.
template <class S, class At>
Moments slow_moments(int64_t n, At at) {
  double sum = 0, squares = 0;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(load_one(at(i)));
  const double mean = sum / static_cast<double>(n);
  for (int64_t i = 0; i < n; ++i) {
    const double d = static_cast<double>(load_one(at(i))) - mean;
    squares += d * d;
  }
  return {static_cast<double>(n), mean, squares};
}

// Of the elements [begin, end) of a channel whose planes are `stride` apart.
template <class S>
Moments plane_moments(const S* x, int64_t stride, int64_t inner, int64_t begin, int64_t end) {
  using C = Compute<S>;
  using V = Vec<C>;
  Moments result;
  PlaneSums<C> start;
  const int64_t block = smaller(kPlaneBlock, end - begin);
  for_planes(inner, begin, begin + block, [&](int64_t plane, int64_t first, int64_t count, int64_t planes) {
    const S* from = x + plane * stride + first;
    for (; planes > 0; --planes, from += stride)
      for_vectors<C>(count,
                     [&](int64_t i, auto lanes, int k) { start.a[k] = start.a[k] + load_vector<C>(from + i, lanes); });
  });
  C shift = static_cast<C>(start.first() / static_cast<double>(block));
  for (int64_t at = begin; at < end; at += kPlaneBlock) {
    const int64_t to = smaller(at + kPlaneBlock, end);
    const V by = V::set1(shift);
    PlaneSums<C> sums;
    for_planes(inner, at, to, [&](int64_t plane, int64_t first, int64_t count, int64_t planes) {
      const S* from = x + plane * stride + first;
      for (; planes > 0; --planes, from += stride)
        for_vectors<C>(count, [&](int64_t i, auto lanes, int k) {
          const V d = first_lanes(load_vector<C>(from + i, lanes) - by, lanes);
          sums.a[k] = sums.a[k] + d;
          sums.b[k] = fma(d, d, sums.b[k]);
        });
    });
    join(result, static_cast<double>(to - at), static_cast<double>(shift), sums.first(), sums.second());
    shift = static_cast<C>(result.mean);
  }
  if (result.squares - result.squares != 0)
    return slow_moments<S>(end - begin,
                           [&](int64_t i) { return x + (begin + i) / inner * stride + (begin + i) % inner; });
  return result;
}

// Of rows [begin, end) of x[rows, channels], every channel: means and sums of squared deviations. sums: a thread's
// arrays.
template <class S>
void row_moments(const S* x, int64_t channels, int64_t padded, int64_t begin, int64_t end, double* mean,
                 double* squares, Compute<S>* sums) {
  using C = Compute<S>;
  using V = Vec<C>;
  C *const shift = sums, *const sum = sums + padded, *const square = sums + 2 * padded;
  // Every vector of a group of rows: body(c, lanes, size, from), from(r) being row r of the group.
  const auto over_rows = [&](int64_t first, int64_t last, auto body) {
    for_rows<kRowGroup>(first, last, [&](int64_t row, auto size) {
      const S* const rows = x + row * channels;
      int64_t c = 0;
      for (; c + V::size <= channels; c += V::size) body(rows + c, c, Fixed<V::size>{}, size);
      if (c < channels) body(rows + c, c, static_cast<int>(channels - c), size);
    });
  };
  for (int64_t c = 0; c < padded; ++c) sum[c] = 0;
  const int64_t block = smaller(kBlockRows, end - begin);
  over_rows(begin, begin + block, [&](const S* from, int64_t c, auto lanes, auto size) {
    V total = V::load(sum + c);
    for (int r = 0; r < size.value; ++r) total = total + load_vector<C>(from + r * channels, lanes);
    total.store(sum + c);
  });
  for (int64_t c = 0; c < channels; ++c) {
    shift[c] = sum[c] / static_cast<C>(block);
    mean[c] = shift[c];
    squares[c] = 0;
  }
  for (int64_t at = begin; at < end; at += kBlockRows) {
    const int64_t to = smaller(at + kBlockRows, end);
    for (int64_t c = 0; c < padded; ++c) sum[c] = square[c] = 0;
    over_rows(at, to, [&](const S* from, int64_t c, auto lanes, auto size) {
      const V by = V::load(shift + c);
      fetch_next<size.value, C>(from - c, channels, c);
      // The group's own sums first: a fourth of the roundings of growing sums.
      V total = V::zero(), total_square = V::zero();
      for (int r = 0; r < size.value; ++r) {
        const V d = load_vector<C>(from + r * channels, lanes) - by;
        total = total + d;
        total_square = fma(d, d, total_square);
      }
      (V::load(sum + c) + total).store(sum + c);
      (V::load(square + c) + total_square).store(square + c);
    });
    // join(), for all channels.
    const double count = static_cast<double>(to - at), before = static_cast<double>(at - begin);
    const double part = count / (before + count), inverse = 1 / count;
    for (int64_t c = 0; c < channels; ++c) {
      const double s = sum[c], difference = static_cast<double>(shift[c]) + s * inverse - mean[c];
      squares[c] += static_cast<double>(square[c]) - s * s * inverse + difference * difference * (before * part);
      mean[c] += difference * part;
      shift[c] = static_cast<C>(mean[c]);
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    if (squares[c] - squares[c] == 0) continue;
    const Moments slow = slow_moments<S>(end - begin, [&](int64_t i) { return x + (begin + i) * channels + c; });
    mean[c] = slow.mean;
    squares[c] = slow.squares;
  }
}

// The moments of all parts, joined in order, into those of the first.
inline void join_parts(const Walk& walk, double* mean, double* squares) {
  double count = static_cast<double>(walk.begin(1) - walk.begin(0));
  for (int64_t part = 1; part < walk.parts; ++part) {
    const double more = static_cast<double>(walk.begin(part + 1) - walk.begin(part)), share = more / (count + more);
    const double *const m = mean + part * walk.padded, *const s = squares + part * walk.padded;
    for (int64_t c = 0; c < walk.channels; ++c) {
      const double difference = m[c] - mean[c];
      squares[c] += s[c] + difference * difference * (count * share);
      mean[c] = mean[c] * (1 - share) + m[c] * share;  // infinite, where one is
    }
    count += more;
  }
}
