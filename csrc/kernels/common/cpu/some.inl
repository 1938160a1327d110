// Loops over vectors, the last of which may be a part of one. Where the compiler knows that one is whole, nothing is
// masked: AVX2 needs several instructions for a part.
#pragma once

#include "numbers.inl"
#include "vec.h"

template <class V, class S>
__attribute__((always_inline)) inline V load_some(const S* p, int count) {
  return count == V::size ? V::load(p) : V::load(p, count);
}
template <class V, class S>
__attribute__((always_inline)) inline void store_some(V v, S* p, int count) {
  count == V::size ? v.store(p) : v.store(p, count);
}

// step(offset, count) for [first, end), one vector after the other. Steps have to be inlined, or count is not known.
template <class V, class Step>
inline void for_vectors(int64_t first, int64_t end, Step step) {
  int64_t i = first;
  for (; i + V::size <= end; i += V::size) step(i, V::size);
  if (i < end) step(i, static_cast<int>(end - i));
}
