#include "../kernels/weight_only/weight_only.h"

#include <ATen/ATen.h>

#include "binding.h"
#include "call.h"
#include "quantized.h"
#include "sizes.h"

namespace fastops {
namespace {

constexpr const char* kWeightOnly = "weight_only";

bool is_group(int64_t group) { return group >= 16 && (group & (group - 1)) == 0; }

// What a weight's dtype says that its elements are.
optional<WeightFormat> format_of(const Tensor& weight) {
  switch (weight.scalar_type()) {
    case at::kChar:
      return WeightFormat::int8;
    case at::kByte:
      return WeightFormat::uint4;
    case at::kFloat8_e4m3fn:
      return WeightFormat::float8;
    default:
      return std::nullopt;
  }
}

// What of these shapes does not fit; "" where everything does.
template <class Int>
std::string weight_only_problem(const Tensor& input, const Tensor& weight, const Tensor& scale,
                                const optional<Tensor>& offset, const optional<Tensor>& bias, int64_t group) {
  const auto x = sizes_as<Int>(input), w = sizes_as<Int>(weight);
  if (x.empty()) return "input must have shape (*, in_features), got a scalar";
  const bool halves = weight.scalar_type() == at::kByte;
  const Int k = x.back(), bytes = halves ? (k + 1) / 2 : k;
  if (w.size() != 2 || differ(w[1], bytes))
    return c10::str("weight must have shape (out_features, ", bytes, ") for in_features = ", k,
                    " (input's last dimension)", halves ? ", two weights in a byte" : "", ", got ", w);
  if (weight.scalar_type() == at::kFloat8_e4m3fn && less(Int(group), k))
    return c10::str("group_size must be in_features for float8 weights, got ", group);
  if (!is_group(group) && less(Int(group), k))
    return c10::str("group_size must be a power of two from 16 on, or in_features, got ", group);
  const Int groups = (k + Int(group - 1)) / Int(group);
  for (const auto& [tensor, name] : {std::pair(&scale, "scale"), {offset ? &*offset : &scale, "offset"}})
    if (sizes_differ<Int>(sizes_as<Int>(*tensor), {w[0], groups}))
      return c10::str(name, " must have shape (", w[0], ", ", groups, "), a column for each group, got ",
                      sizes_as<Int>(*tensor));
  if (bias && sizes_differ(sizes_as<Int>(*bias), w.slice(0, 1)))
    return c10::str("bias must have shape (", w[0], ",) (weight's out_features), got ", sizes_as<Int>(*bias));
  return {};
}

template <class Int>
Tensor new_output(const Tensor& input, const Tensor& weight, const Tensor& scale, const optional<Tensor>& offset,
                  const optional<Tensor>& bias, int64_t group) {
  check_dense_on_cpu(input, input, kWeightOnly, "input");
  check_dense_on_cpu(weight, input, kWeightOnly, "weight");
  TORCH_CHECK(has_quantized_kernel(input.scalar_type()), kWeightOnly,
              ": input must be float32, bfloat16 or float16, got ", dtype_name(input.scalar_type()));
  TORCH_CHECK(format_of(weight), kWeightOnly,
              ": weight must be int8, float8_e4m3fn, or uint8 for two weights in a byte, got ",
              dtype_name(weight.scalar_type()));
  TORCH_CHECK(!offset || weight.scalar_type() != at::kFloat8_e4m3fn, kWeightOnly, ": float8 weights have no offset");
  for (const auto& [tensor, name] : {std::pair(&scale, "scale"), {offset ? &*offset : &scale, "offset"}}) {
    check_dense_on_cpu(*tensor, input, kWeightOnly, name);
    TORCH_CHECK(tensor->scalar_type() == at::kFloat, kWeightOnly, ": ", name, " must be float32, got ",
                dtype_name(tensor->scalar_type()));
  }
  if (bias) {
    check_dense_on_cpu(*bias, input, kWeightOnly, "bias");
    check_dtype(*bias, input.scalar_type(), kWeightOnly, "bias");
  }
  TORCH_CHECK(group > 0, kWeightOnly, ": group_size must be positive, got ", group);
  const std::string problem = weight_only_problem<Int>(input, weight, scale, offset, bias, group);
  TORCH_CHECK(problem.empty(), kWeightOnly, ": ", problem);
  SizeVector<Int> sizes(sizes_as<Int>(input));
  sizes.back() = sizes_as<Int>(weight)[0];
  return new_tensor<Int>(sizes, input.scalar_type(), input.device());
}

Tensor weight_only_forward(const Tensor& input, const Tensor& weight, const Tensor& scale,
                           const optional<Tensor>& offset, const optional<Tensor>& bias, int64_t group,
                           Activation activation) {
  const Tensor y = new_output<int64_t>(input, weight, scale, offset, bias, group);
  if (y.numel() == 0) return y;
  const auto type = input.scalar_type();
  const int64_t k = input.size(-1), n = weight.size(0), m = y.numel() / n;
  const Tensor x = input.reshape({m, k}).contiguous(), w = weight.stride(1) == 1 ? weight : weight.contiguous();
  const Tensor s = scale.contiguous(), o = offset ? offset->contiguous() : Tensor(),
               b = bias ? bias->contiguous() : Tensor();
  const WeightOnlyForward call{.dtype = to_dtype(type),
                               .format = *format_of(w),
                               .m = m,
                               .n = n,
                               .k = k,
                               .group = group,
                               .x_row_stride = k,
                               .w_row_stride = w.stride(0),
                               .y_row_stride = n,
                               .with_offset = o.defined(),
                               .with_bias = b.defined(),
                               .activation = activation};
  run(call,
      {x.const_data_ptr(), w.const_data_ptr(), s.const_data_ptr<float>(),
       o.defined() ? o.const_data_ptr<float>() : nullptr, data_or_null(b), y.mutable_data_ptr()},
      at::kCPU, [&] { return record::Row{kWeightOnly, "", record::shapes_of({input, weight, b}), dtype_name(type)}; });
  return y;
}

// ---- the general door

template <class Int>
Tensor weight_only_forward_op(const Tensor& input, const Tensor& weight, const Tensor& scale,
                              const optional<Tensor>& offset, const optional<Tensor>& bias, int64_t group_size) {
  if constexpr (is_symbolic<Int>)
    return new_output<Int>(input, weight, scale, offset, bias, group_size);
  else
    return weight_only_forward(input, weight, scale, offset, bias, group_size, {});
}

// ---- the fast door: nothing is recorded

py::object weight_only_fast(py::handle input, py::handle weight, py::handle scale, py::handle offset, py::handle bias,
                            py::handle group_size, int kind, double a, double b) {
  int64_t group = 0;
  if (!fast_door::ambient_is_plain() || !read_int(group_size.ptr(), group)) return not_implemented();
  bool recorded = false;
  for (const py::handle operand : {input, weight, scale, offset, bias}) {
    if (operand.is_none()) continue;
    if (!fast_door::is_plain(operand.ptr())) return not_implemented();
    recorded = recorded || needs_grad(THPVariable_Unpack(operand.ptr()));
  }
  const auto tensor = [](py::handle operand) {
    return operand.is_none() ? optional<Tensor>() : THPVariable_Unpack(operand.ptr());
  };
  const optional<Tensor> x = tensor(input), w = tensor(weight), s = tensor(scale), o = tensor(offset), c = tensor(bias);
  if (!x || !w || !s || (recorded && autograd_records()) || !x->is_cpu() || !has_quantized_kernel(x->scalar_type()) ||
      at::autocast::is_autocast_enabled(at::kCPU) || (c && c->scalar_type() != x->scalar_type()))
    return not_implemented();
  const at::AutoDispatchBelowADInplaceOrView guard;
  return wrap(without_gil([] { return kWeightOnly; },
                          [&] { return weight_only_forward(*x, *w, *s, o, c, group, make_activation(kind, a, b)); }, *x,
                          *w));
}

}  // namespace

void implement_weight_only(torch::Library& m, bool meta) {
  meta ? m.impl("weight_only_forward", weight_only_forward_op<c10::SymInt>)
       : m.impl("weight_only_forward", weight_only_forward_op<int64_t>);
}

void bind_weight_only(py::module_& m) { fast_def<&weight_only_fast>(m, "weight_only"); }

}  // namespace fastops
