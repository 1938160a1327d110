#include "attention.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "aten.h"
#include "binding.h"
#include "call.h"
#include "memory.h"
#include "node.h"
#include "sizes.h"

namespace fastops {
namespace {

// An attention besides its tensors.
struct AttentionArgs {
  bool causal;
  double scale;
};

struct AttentionOutput {
  Tensor y, lse;  // lse is undefined if not wanted
};

// On a GPU there are no 16-bit kernels.
bool has_kernel(const Tensor& query) {
  const auto type = query.scalar_type();
  return is_supported(type) && (query.is_cpu() || type == at::kFloat || type == at::kDouble);
}

// The dtype of lse.
at::ScalarType lse_type(const Tensor& query) { return query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// query (batch, heads, queries, size), key (batch, heads, keys, size), value (batch, heads, keys, value_size), mask
// broadcastable to (batch, heads, queries, keys).
template <class Int>
void check_attention(const Tensor& query, const Tensor& key, const Tensor& value, const optional<Tensor>& mask) {
  constexpr const char* op = "attention";
  check_input(query, op, "query");
  TORCH_CHECK(query.dim() == 4, op, ": query must have 4 dimensions, got shape ", sizes_as<Int>(query));
  const auto q = sizes_as<Int>(query);
  const auto check = [&](const Tensor& tensor, const char* name) {
    check_tensor(tensor, op, name, query.device());
    check_dtype(tensor, query.scalar_type(), op, name);
    const auto sizes = sizes_as<Int>(tensor);
    TORCH_CHECK(tensor.dim() == 4 && !differ(sizes[0], q[0]) && !differ(sizes[1], q[1]), op, ": ", name,
                " must have 4 dimensions, the first two as query's shape ", q, ", got shape ", sizes);
  };
  check(key, "key");
  check(value, "value");
  const auto k = sizes_as<Int>(key), v = sizes_as<Int>(value);
  TORCH_CHECK(!differ(k[3], q[3]), op, ": key must have query's last size ", q[3], ", got ", k[3]);
  TORCH_CHECK(!differ(v[2], k[2]), op, ": value must have key's length ", k[2], ", got ", v[2]);
  if (!mask) return;
  check_tensor(*mask, op, "mask", query.device());
  check_dtype(*mask, query.scalar_type(), op, "mask");
  const SizeVector<Int> full{q[0], q[1], q[2], k[2]};
  const auto m = sizes_as<Int>(*mask);
  bool fits = m.size() <= 4;
  for (size_t i = 0; fits && i < m.size(); ++i) fits = !differ(m[i], full[4 - m.size() + i]) || !differ(m[i], Int(1));
  TORCH_CHECK(fits, op, ": mask must be broadcastable to ", Sizes<Int>(full), ", got shape ", m);
}

// A result with these sizes in the order of the dimensions in memory that `like` has: PyTorch's rule, which lets a
// model merge the heads again without a copy.
template <class Int>
Tensor empty_like_order(Sizes<Int> sizes, const Tensor& like) {
  const auto type = like.scalar_type();
  // (batch, length, heads, size) in memory, or (batch, heads, length, size).
  const auto strides = strides_as<Int>(like);
  if (!less(strides[1], strides[2])) return new_tensor<Int>(sizes, type, like.device());
  const SizeVector<Int> turned{sizes[1] * sizes[2] * sizes[3], sizes[3], sizes[1] * sizes[3], Int(1)};
  return new_tensor_strided<Int>(sizes, turned, type, like.device());
}

template <class Int>
Tensor empty_attention(const Tensor& query, const Tensor& value) {
  const auto q = sizes_as<Int>(query);
  const SizeVector<Int> sizes{q[0], q[1], q[2], sizes_as<Int>(value)[3]};
  return empty_like_order<Int>(sizes, query);
}

template <class Int>
Tensor empty_lse(const Tensor& query) {
  return new_tensor<Int>(sizes_as<Int>(query).slice(0, 3), lse_type(query), query.device());
}

HeadStrides strides_of(const Tensor& tensor) {
  return tensor.defined() ? HeadStrides{tensor.stride(0), tensor.stride(1), tensor.stride(2)} : HeadStrides{};
}

// The kernels want contiguous rows.
Tensor with_rows(const Tensor& tensor) {
  return tensor.stride(3) == 1 || tensor.size(3) == 1 ? tensor : tensor.contiguous();
}

// The mask with four dimensions, of which all but the last may be expanded.
Tensor expanded(const optional<Tensor>& mask, const Tensor& query, const Tensor& key) {
  if (!mask) return {};
  Tensor m = *mask;
  const int64_t keys = key.size(2);
  if (m.dim() == 0 || m.size(-1) != keys || (keys > 1 && m.stride(-1) != 1)) {
    std::vector<int64_t> sizes = m.sizes().vec();
    if (sizes.empty()) sizes.push_back(1);
    sizes.back() = keys;
    m = m.expand(sizes).contiguous();
  }
  return m.expand({query.size(0), query.size(1), query.size(2), keys});
}

AttentionShape shape_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& y, const Tensor& mask,
                        const AttentionArgs& args) {
  return {to_dtype(q.scalar_type()),
          args.causal,
          mask.defined(),
          args.scale,
          q.size(0),
          q.size(1),
          q.size(2),
          k.size(2),
          q.size(3),
          v.size(3),
          strides_of(q),
          strides_of(k),
          strides_of(v),
          strides_of(y),
          strides_of(mask)};
}

AttentionOutput attention_forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                  const optional<Tensor>& mask, const AttentionArgs& args, bool need_lse) {
  check_attention<int64_t>(query, key, value, mask);
  AttentionOutput out;
  out.y = empty_attention<int64_t>(query, value);
  if (need_lse) out.lse = empty_lse<int64_t>(query);
  if (query.numel() == 0 || value.numel() == 0) {
    out.y.zero_();
    if (need_lse) out.lse.fill_(-INFINITY);
    return out;
  }
  const Tensor q = with_rows(query), k = with_rows(key), v = with_rows(value), m = expanded(mask, query, key);
  run(AttentionForward{shape_of(q, k, v, out.y, m, args), to_dtype(q.scalar_type())},
      {q.const_data_ptr(), k.const_data_ptr(), v.const_data_ptr(), data_or_null(m), out.y.mutable_data_ptr(),
       mutable_or_null(out.lse)},
      q.device(), [&] {
        return record::Row{
            "scaled_dot_product_attention", {}, record::shapes_of({q, k, v}), dtype_name(q.scalar_type())};
      });
  return out;
}

// The gradients of query, key and value; those that are not wanted are undefined. out: where they go, if somebody has
// made room for them.
std::array<Tensor, 3> attention_backward(const Tensor& grad_output, const Tensor& query, const Tensor& key,
                                         const Tensor& value, const optional<Tensor>& mask, const Tensor& output,
                                         const Tensor& lse, const AttentionArgs& args, std::array<bool, 3> output_mask,
                                         std::array<Tensor, 3> out = {}) {
  check_attention<int64_t>(query, key, value, mask);
  constexpr const char* op = "attention_backward";
  for (const Tensor* tensor : {&grad_output, &output}) {
    const char* const name = tensor == &output ? "output" : "grad_output";
    check_tensor(*tensor, op, name, query.device());
    check_dtype(*tensor, query.scalar_type(), op, name);
    const std::array<int64_t, 4> sizes{query.size(0), query.size(1), query.size(2), value.size(3)};
    TORCH_CHECK(tensor->sizes() == at::IntArrayRef(sizes), op, ": ", name, " must have shape ", at::IntArrayRef(sizes),
                ", got ", tensor->sizes());
  }
  TORCH_CHECK(lse.sizes() == query.sizes().slice(0, 3) && lse.scalar_type() == lse_type(query), op,
              ": lse must have shape ", query.sizes().slice(0, 3), " and dtype ", lse_type(query), ", got ",
              lse.sizes(), " and ", lse.scalar_type());
  const Tensor* const operands[] = {&query, &key, &value};
  for (size_t i = 0; i < 3; ++i)
    if (output_mask[i] && !out[i].defined()) out[i] = empty_like_order<int64_t>(operands[i]->sizes(), *operands[i]);
  if (query.numel() == 0 || value.numel() == 0) {
    for (Tensor& tensor : out)
      if (tensor.defined()) tensor.zero_();
    return out;
  }
  const Tensor g = with_rows(grad_output), q = with_rows(query), k = with_rows(key), v = with_rows(value),
               y = with_rows(output), m = expanded(mask, query, key), l = lse.contiguous();
  run(AttentionBackward{shape_of(q, k, v, y, m, args), to_dtype(q.scalar_type()), strides_of(g), strides_of(out[0]),
                        strides_of(out[1]), strides_of(out[2])},
      {g.const_data_ptr(), q.const_data_ptr(), k.const_data_ptr(), v.const_data_ptr(), data_or_null(m),
       y.const_data_ptr(), l.const_data_ptr(), mutable_or_null(out[0]), mutable_or_null(out[1]),
       mutable_or_null(out[2])},
      q.device(), [&] {
        return record::Row{
            "scaled_dot_product_attention_backward", {}, record::shapes_of({g, q, k, v}), dtype_name(q.scalar_type())};
      });
  return out;
}

// The same in torch's own differentiable ops, for a gradient that will be differentiated, or that is batched or dual.
// Nothing is read of the forward pass but its operands.
std::array<Tensor, 3> differentiable_attention_backward(const Tensor& grad_output, const Tensor& query,
                                                        const Tensor& key, const Tensor& value,
                                                        const optional<Tensor>& mask, const AttentionArgs& args,
                                                        std::array<bool, 3> output_mask) {
  Tensor scores = at::matmul(query, key.transpose(-2, -1)) * args.scale;
  if (mask) scores = scores + *mask;
  if (args.causal) {
    const Tensor seen = at::ones_symint({query.sym_size(2), key.sym_size(2)}, query.options().dtype(at::kBool)).tril();
    scores = scores.masked_fill(seen.logical_not(), -INFINITY);
  }
  // A query that sees no key has no probabilities.
  const Tensor nothing = (scores == -INFINITY).all(-1, /*keepdim=*/true);
  const Tensor p = scores.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0);
  std::array<Tensor, 3> out;
  if (output_mask[2]) out[2] = at::matmul(p.transpose(-2, -1), grad_output);
  if (!output_mask[0] && !output_mask[1]) return out;
  const Tensor grad_p = at::matmul(grad_output, value.transpose(-2, -1));
  const Tensor d = p * (grad_p - (grad_p * p).sum(-1, /*keepdim=*/true)) * args.scale;
  if (output_mask[0]) out[0] = at::matmul(d, key);
  if (output_mask[1]) out[1] = at::matmul(d.transpose(-2, -1), query);
  return out;
}

struct AttentionOp {
  struct Args : AttentionArgs {
    bool with_mask;
  };
  static std::string name(const Args&) { return "scaled_dot_product_attention"; }
  static c10::IValue pack(const Args& args) {
    return std::vector<double>{static_cast<double>(args.causal), args.scale, static_cast<double>(args.with_mask)};
  }
  static Args unpack(const c10::IValue& packed) {
    const auto values = packed.toDoubleVector();
    return {{values[0] != 0, values[1]}, values[2] != 0};
  }
  // saved: query, key, value, mask, output and lse.
  static variable_list gradients(const Args& args, at::TensorList saved, const variable_list& grads, Needs needs) {
    if (!grads[0].defined()) return variable_list(3);
    const optional<Tensor> mask = args.with_mask ? optional<Tensor>(saved[3]) : std::nullopt;
    const std::array<bool, 3> wanted{needs(0), needs(1), needs(2)};
    const bool direct = !at::GradMode::is_enabled() && fast_door::is_plain(grads[0]);
    const auto out =
        direct ? attention_backward(grads[0], saved[0], saved[1], saved[2], mask, saved[4], saved[5], args, wanted)
               : differentiable_attention_backward(grads[0], saved[0], saved[1], saved[2], mask, args, wanted);
    return {out.begin(), out.end()};
  }
};

// Query, key and value that are three parts of one tensor, which they cover: of the output of one linear layer.
struct Parts {
  std::array<size_t, 3> order;  // which comes first in memory
  // (3, batch, heads, length, size): from the slowest dimension in memory to the fastest, as the tensor has them.
  std::array<int64_t, 5> permutation;
};

optional<Parts> parts_of(const Tensor& whole, const Tensor& query, const Tensor& key, const Tensor& value) {
  const Tensor* const parts[] = {&query, &key, &value};
  if (!whole.is_contiguous() || whole.numel() == 0) return std::nullopt;
  for (const Tensor* part : parts)
    if (!part->is_alias_of(whole) || part->scalar_type() != whole.scalar_type() || part->sizes() != query.sizes() ||
        part->strides() != query.strides())
      return std::nullopt;
  Parts found{{0, 1, 2}, {0, 1, 2, 3, 4}};
  std::sort(found.order.begin(), found.order.end(),
            [&](size_t a, size_t b) { return parts[a]->storage_offset() < parts[b]->storage_offset(); });
  const auto offset = [&](size_t i) { return parts[found.order[i]]->storage_offset() - whole.storage_offset(); };
  const int64_t step = offset(1);
  if (offset(0) != 0 || offset(2) != 2 * step) return std::nullopt;
  const std::array<int64_t, 5> sizes{3, query.size(0), query.size(1), query.size(2), query.size(3)},
      strides{step, query.stride(0), query.stride(1), query.stride(2), query.stride(3)};
  std::sort(found.permutation.begin(), found.permutation.end(), [&](int64_t a, int64_t b) {
    const auto key_of = [&](int64_t i) {  // a dimension of one element may have any stride
      return std::pair(sizes[static_cast<size_t>(i)] == 1 ? INT64_MAX : strides[static_cast<size_t>(i)], -i);
    };
    return key_of(a) > key_of(b);
  });
  int64_t expected = 1;
  for (size_t i = 5; i-- > 0;) {
    const auto d = static_cast<size_t>(found.permutation[i]);
    if (sizes[d] != 1 && strides[d] != expected) return std::nullopt;
    expected *= sizes[d];
  }
  if (expected != whole.numel()) return std::nullopt;
  return found;
}

// The attention of three parts of one tensor, as an op of that tensor: its gradient is written where it belongs, which
// saves three tensors of zeros as large as all of it, with a part copied into each, and their sum. saved: as
// AttentionOp's, and the whole tensor.
struct AttentionOfPartsOp {
  using Args = AttentionOp::Args;
  static constexpr auto name = AttentionOp::name;
  static constexpr auto pack = AttentionOp::pack;
  static constexpr auto unpack = AttentionOp::unpack;

  static variable_list gradients(const Args& args, at::TensorList saved, const variable_list& grads, Needs needs) {
    if (!grads[0].defined() || !needs(0)) return variable_list(1);
    const optional<Tensor> mask = args.with_mask ? optional<Tensor>(saved[3]) : std::nullopt;
    constexpr std::array<bool, 3> wanted{true, true, true};
    const Tensor& whole = saved[6];
    if (!at::GradMode::is_enabled() && fast_door::is_plain(grads[0])) {
      const Tensor gradient = empty_output(whole.sizes(), whole.scalar_type(), whole.device());
      std::array<Tensor, 3> out;
      for (size_t i = 0; i < 3; ++i)
        out[i] = gradient.as_strided(saved[i].sizes(), saved[i].strides(),
                                     saved[i].storage_offset() - whole.storage_offset());
      attention_backward(grads[0], saved[0], saved[1], saved[2], mask, saved[4], saved[5], args, wanted, out);
      return {gradient};
    }
    const auto out = differentiable_attention_backward(grads[0], saved[0], saved[1], saved[2], mask, args, wanted);
    const auto parts = parts_of(whole, saved[0], saved[1], saved[2]);
    TORCH_INTERNAL_ASSERT(parts);
    const Tensor stacked = at::stack({out[parts->order[0]], out[parts->order[1]], out[parts->order[2]]});
    return {stacked.permute(parts->permutation).reshape(whole.sizes())};
  }
};

// whole: what query, key and value are parts of and nobody else reads; undefined if nobody says.
Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value, const optional<Tensor>& mask,
                 const AttentionArgs& args, const Tensor& whole = none) {
  const bool records = is_recorded(needs_grad(query) || needs_grad(key) || needs_grad(value), query, key, value);
  const AttentionOutput out = attention_forward(query, key, value, mask, args, records);
  if (!records) return out.y;
  if (whole.defined() && whole.requires_grad() && !whole.is_view() && parts_of(whole, query, key, value)) {
    const auto node = make_node<AttentionOfPartsOp>({args, mask.has_value()}, whole);
    torch::autograd::set_history(out.y, node);
    save(node, query, key, value, mask ? *mask : none, out.y, out.lse, whole);
    return out.y;
  }
  const auto node = make_node<AttentionOp>({args, mask.has_value()}, query, key, value);
  torch::autograd::set_history(out.y, node);
  save(node, query, key, value, mask ? *mask : none, out.y, out.lse);
  return out.y;
}

// ---- the general door

template <class Int>
std::tuple<Tensor, Tensor> attention_forward_op(const Tensor& query, const Tensor& key, const Tensor& value,
                                                const optional<Tensor>& mask, bool causal, double scale) {
  if constexpr (is_symbolic<Int>) {
    check_attention<Int>(query, key, value, mask);
    return {empty_attention<Int>(query, value), empty_lse<Int>(query)};
  } else {
    const AttentionOutput out = attention_forward(query, key, value, mask, {causal, scale}, /*need_lse=*/true);
    return {out.y, out.lse};
  }
}

template <class Int>
std::tuple<Tensor, Tensor, Tensor> attention_backward_op(const Tensor& grad_output, const Tensor& query,
                                                         const Tensor& key, const Tensor& value,
                                                         const optional<Tensor>& mask, const Tensor& output,
                                                         const Tensor& lse, bool causal, double scale,
                                                         std::array<bool, 3> output_mask) {
  std::array<Tensor, 3> out;
  if constexpr (is_symbolic<Int>) {
    check_attention<Int>(query, key, value, mask);
    const Tensor* const operands[] = {&query, &key, &value};
    for (size_t i = 0; i < 3; ++i)
      if (output_mask[i]) out[i] = empty_like_order<Int>(sizes_as<Int>(*operands[i]), *operands[i]);
  } else {
    out = attention_backward(grad_output, query, key, value, mask, output, lse, {causal, scale}, output_mask);
  }
  return or_empty(out, query);
}

template <class Int>
void implement_attention(torch::Library& m) {
  m.impl("attention_forward", attention_forward_op<Int>);
  m.impl("attention_backward", attention_backward_op<Int>);
}

// ---- the fast door. Attention is on autocast's lower-precision list.

Tensor cast_as_autocast(const Tensor& tensor) {
  if (!at::autocast::is_autocast_enabled(at::kCPU)) return tensor;
  return at::autocast::cached_cast(at::autocast::get_autocast_dtype(at::kCPU), tensor, at::kCPU);
}

py::object attention_of_parts_fast(py::handle whole, py::handle query, py::handle key, py::handle value,
                                   py::handle mask, py::handle is_causal, py::handle scale) {
  bool causal = false;
  if (!read_bool(is_causal.ptr(), causal) || (causal && !mask.is_none())) return not_implemented();
  if (!fast_door::ambient_is_plain()) return not_implemented();
  for (const py::handle tensor : {query, key, value})
    if (!fast_door::is_plain(tensor.ptr())) return not_implemented();
  if (!whole.is_none() && !fast_door::is_plain(whole.ptr())) return not_implemented();
  const Tensor w = whole.is_none() ? none : THPVariable_Unpack(whole.ptr());
  const Tensor q = cast_as_autocast(THPVariable_Unpack(query.ptr())),
               k = cast_as_autocast(THPVariable_Unpack(key.ptr())),
               v = cast_as_autocast(THPVariable_Unpack(value.ptr()));
  if ((!q.is_cpu() && at::autocast::is_autocast_enabled(q.device().type())) || !has_kernel(q) || q.dim() != 4)
    return not_implemented();
  for (const Tensor* tensor : {&k, &v})
    if (!is_on(*tensor, q.device()) || tensor->scalar_type() != q.scalar_type() || tensor->dim() != 4 ||
        tensor->size(0) != q.size(0) || tensor->size(1) != q.size(1))
      return not_implemented();
  if (k.size(3) != q.size(3) || v.size(2) != k.size(2) || (q.is_cpu() && !attention_pays(q.size(2), k.size(2))))
    return not_implemented();
  optional<Tensor> m;
  if (!mask.is_none()) {
    if (!fast_door::is_plain(mask.ptr())) return not_implemented();
    m = cast_as_autocast(THPVariable_Unpack(mask.ptr()));
    if (!is_on(*m, q.device()) || m->scalar_type() != q.scalar_type() || m->requires_grad() || m->dim() > 4)
      return not_implemented();
    const std::array<int64_t, 4> full{q.size(0), q.size(1), q.size(2), k.size(2)};
    for (int64_t i = 0; i < m->dim(); ++i)
      if (m->size(i) != full[static_cast<size_t>(4 - m->dim() + i)] && m->size(i) != 1) return not_implemented();
  }
  const double factor = scale.is_none() ? 1 / std::sqrt(static_cast<double>(q.size(3))) : PyFloat_AsDouble(scale.ptr());
  if (PyErr_Occurred()) throw py::error_already_set();
  return wrap(without_gil([] { return "scaled_dot_product_attention"; },
                          [&] { return fastops::attention(q, k, v, m, {causal, factor}, w); }, q, k, v, m));
}

py::object attention_fast(py::handle query, py::handle key, py::handle value, py::handle mask, py::handle is_causal,
                          py::handle scale) {
  return attention_of_parts_fast(py::none(), query, key, value, mask, is_causal, scale);
}

}  // namespace

Tensor attention_recorded(const Tensor& query, const Tensor& key, const Tensor& value, const optional<Tensor>& mask,
                          bool causal, double scale) {
  return fastops::attention(query, key, value, mask, {causal, scale});
}

void implement_attention(torch::Library& m, bool meta) {
  meta ? implement_attention<c10::SymInt>(m) : implement_attention<int64_t>(m);
}

void bind_attention(py::module_& m) {
  fast_def<&attention_fast>(m, "scaled_dot_product_attention");
  fast_def<&attention_of_parts_fast>(m, "attention_of_parts");
  m.def("attention_pays", &attention_pays);
}

}  // namespace fastops
