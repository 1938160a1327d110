// What the rules of an op's shapes are written over: sizes that are numbers (int64_t, for the kernels and the fast
// door) or symbols (c10::SymInt, for the Meta kernels, which torch.compile, torch.export and fake tensors run).
#pragma once

#include <ATen/ATen.h>
#include <c10/core/SymBool.h>
#include <c10/core/SymInt.h>

#include "check.h"
#include "memory.h"

namespace fastops {

template <class Int>
constexpr bool is_symbolic = std::is_same_v<Int, c10::SymInt>;
template <class Int>
using Sizes = c10::ArrayRef<Int>;
template <class Int>
using SizeVector = c10::SmallVector<Int, 5>;

// The tensor's sizes, as numbers or as symbols.
template <class Int>
Sizes<Int> sizes_as(const at::Tensor& tensor) {
  if constexpr (is_symbolic<Int>)
    return tensor.sym_sizes();
  else
    return tensor.sizes();
}

template <class Int>
Sizes<Int> strides_as(const at::Tensor& tensor) {
  if constexpr (is_symbolic<Int>)
    return tensor.sym_strides();
  else
    return tensor.strides();
}

// a < b, a == b and a != b. Of symbols without a value (unbacked ones) only what holds for all values does: no rule
// refuses what may be good.
inline bool less(int64_t a, int64_t b) { return a < b; }
inline bool less(const c10::SymInt& a, const c10::SymInt& b) { return TORCH_GUARD_OR_FALSE(a.sym_lt(b)); }
inline bool same(int64_t a, int64_t b) { return a == b; }
inline bool same(const c10::SymInt& a, const c10::SymInt& b) { return TORCH_GUARD_OR_FALSE(a.sym_eq(b)); }
inline bool differ(int64_t a, int64_t b) { return a != b; }
inline bool differ(const c10::SymInt& a, const c10::SymInt& b) { return TORCH_GUARD_OR_FALSE(a.sym_ne(b)); }
template <class Int>
bool sizes_differ(Sizes<Int> a, Sizes<Int> b) {
  return a.size() != b.size() ||
         !std::equal(a.begin(), a.end(), b.begin(), [](const Int& x, const Int& y) { return !differ(x, y); });
}

// The dtype of what norms and losses save of an input's numbers.
inline at::ScalarType statistics_type(const at::Tensor& input) {
  return input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Uninitialised tensors: memory of ours for numbers, none for symbols.
template <class Int>
at::Tensor new_tensor(Sizes<Int> sizes, at::ScalarType type, at::Device device) {
  if constexpr (is_symbolic<Int>)
    return at::empty_symint(sizes, at::TensorOptions().dtype(type).device(device));
  else
    return empty_output(sizes, type, device);
}
template <class Int>
at::Tensor new_tensor_strided(Sizes<Int> sizes, Sizes<Int> strides, at::ScalarType type, at::Device device) {
  if constexpr (is_symbolic<Int>)
    return at::empty_strided_symint(sizes, strides, at::TensorOptions().dtype(type).device(device));
  else
    return empty_output_strided(sizes, strides, type, device);
}

// The strides of a dense tensor of these sizes whose dimensions lie in the order of the operands' strides, which is
// what PyTorch's elementwise ops give a result. Operands have these sizes; of two dimensions the first operand that
// tells them apart decides. Source: at::TensorIteratorBase::reorder_dimensions.
template <class Int>
SizeVector<Int> elementwise_strides(Sizes<Int> sizes, std::initializer_list<Sizes<Int>> operands) {
  // Below 0 where a lies inside b, above 0 where it lies around it, 0 where no operand says.
  const auto compare = [&](size_t a, size_t b) {
    for (const Sizes<Int>& strides : operands) {
      if (same(strides[a], Int(0)) || same(strides[b], Int(0))) continue;
      if (less(strides[a], strides[b])) return -1;
      if (less(strides[b], strides[a]) || less(sizes[b], sizes[a])) return 1;
    }
    return 0;
  };
  c10::SmallVector<size_t, 5> order;  // from the innermost dimension to the outermost
  for (size_t i = sizes.size(); i-- > 0;) order.push_back(i);
  for (size_t i = 1; i < order.size(); ++i) {
    for (size_t here = i, inner = i; inner-- > 0;) {
      const int comparison = compare(order[inner], order[here]);
      if (comparison < 0) break;
      if (comparison == 0) continue;
      std::swap(order[inner], order[here]);
      here = inner;
    }
  }
  SizeVector<Int> strides(sizes.size(), Int(1));
  Int step = 1;
  for (const size_t i : order) {
    strides[i] = step;
    step = step * sizes[i];
  }
  return strides;
}

// An uninitialised tensor for a result of this input, with the strides that PyTorch's elementwise ops give theirs.
template <class Int>
at::Tensor empty_result(const at::Tensor& input) {
  const auto type = input.scalar_type();
  if (input.is_contiguous_or_false()) return new_tensor<Int>(sizes_as<Int>(input), type, input.device());
  if (input.unsafeGetTensorImpl()->is_non_overlapping_and_dense_or_false())
    return new_tensor_strided<Int>(sizes_as<Int>(input), strides_as<Int>(input), type, input.device());
  const auto strides = elementwise_strides<Int>(sizes_as<Int>(input), {strides_as<Int>(input)});
  return new_tensor_strided<Int>(sizes_as<Int>(input), strides, type, input.device());
}

// The tensor in the memory order of `strides`: itself where it lies so, a copy otherwise.
inline at::Tensor in_order(const at::Tensor& tensor, at::IntArrayRef strides) {
  bool lies_so = true;
  for (int64_t i = 0; i < tensor.dim(); ++i)
    lies_so &= tensor.size(i) == 1 || tensor.stride(i) == strides[static_cast<size_t>(i)];
  if (lies_so) return tensor;
  const at::AutoDispatchBelowADInplaceOrView guard;
  at::Tensor copy = empty_output_strided(tensor.sizes(), strides, tensor.scalar_type(), tensor.device());
  copy.copy_(tensor);
  return copy;
}

}  // namespace fastops
