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

// The same where nothing is known of what is left.
template <class V, class T>
inline V load_upto(const T* p, int64_t left) {
  return left >= V::size ? V::load(p) : V::load(p, static_cast<int>(left));
}
template <class V, class T>
inline void store_upto(V v, T* p, int64_t left) {
  if (left >= V::size)
    v.store(p);
  else
    v.store(p, static_cast<int>(left));
}

// step(offset, count) for [first, end), one vector after the other. Steps have to be inlined, or count is not known.
template <class V, class Step>
inline void for_vectors(int64_t first, int64_t end, Step step) {
  int64_t i = first;
  for (; i + V::size <= end; i += V::size) step(i, V::size);
  if (i < end) step(i, static_cast<int>(end - i));
}
