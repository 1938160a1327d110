#include "../kernels/linear_int8/linear_int8.h"

#include <ATen/ATen.h>

#include <mutex>

#include "binding.h"
#include "call.h"
#include "fingerprint.h"
#include "quantized.h"
#include "sizes.h"

namespace fastops {
namespace {

constexpr const char* kLinearInt8 = "linear_int8";

// What of these shapes does not fit; "" where everything does.
template <class Int>
std::string linear_int8_problem(const Tensor& input, const Tensor& weight, const Tensor& scale,
                                const optional<Tensor>& bias) {
  const auto x = sizes_as<Int>(input), w = sizes_as<Int>(weight);
  if (x.empty()) return "input must have shape (*, in_features), got a scalar";
  if (w.size() != 2 || differ(w[1], x.back()))
    return c10::str("weight must have shape (out_features, in_features) with in_features = ", x.back(),
                    " (input's last dimension), got ", w);
  if (sizes_differ(sizes_as<Int>(scale), w.slice(0, 1)))
    return c10::str("scale must have shape (", w[0], ",) (weight's out_features), got ", sizes_as<Int>(scale));
  if (bias && sizes_differ(sizes_as<Int>(*bias), w.slice(0, 1)))
    return c10::str("bias must have shape (", w[0], ",) (weight's out_features), got ", sizes_as<Int>(*bias));
  return {};
}

template <class Int>
Tensor new_output(const Tensor& input, const Tensor& weight, const Tensor& scale, const optional<Tensor>& bias) {
  check_dense_on_cpu(input, input, kLinearInt8, "input");
  check_dense_on_cpu(weight, input, kLinearInt8, "weight");
  check_dense_on_cpu(scale, input, kLinearInt8, "scale");
  if (bias) check_dense_on_cpu(*bias, input, kLinearInt8, "bias");
  TORCH_CHECK(has_quantized_kernel(input.scalar_type()), kLinearInt8,
              ": input must be float32, bfloat16 or float16, got ", dtype_name(input.scalar_type()));
  TORCH_CHECK(weight.scalar_type() == at::kChar, kLinearInt8, ": weight must be int8, got ",
              dtype_name(weight.scalar_type()));
  TORCH_CHECK(scale.scalar_type() == at::kFloat, kLinearInt8, ": scale must be float32, got ",
              dtype_name(scale.scalar_type()));
  if (bias) check_dtype(*bias, input.scalar_type(), kLinearInt8, "bias");
  const std::string problem = linear_int8_problem<Int>(input, weight, scale, bias);
  TORCH_CHECK(problem.empty(), kLinearInt8, ": ", problem);
  SizeVector<Int> sizes(sizes_as<Int>(input));
  TORCH_CHECK(!less(Int(kMostInt8Features), sizes.back()), kLinearInt8, ": weight must have at most ",
              kMostInt8Features, " in_features, whose products fit 32 bits, got ", sizes.back());
  sizes.back() = sizes_as<Int>(weight)[0];
  return new_tensor<Int>(sizes, input.scalar_type(), input.device());
}

// packed: null, or what Plan::pack made of the weight.
Tensor run_forward(const Tensor& input, const Tensor& weight, const Tensor& scale, const optional<Tensor>& bias,
                   Activation activation, const void* packed) {
  const Tensor y = new_output<int64_t>(input, weight, scale, bias);
  if (y.numel() == 0) return y;
  const auto type = input.scalar_type();
  const int64_t k = input.size(-1), n = weight.size(0), m = y.numel() / n;
  const Tensor x = input.reshape({m, k}).contiguous();
  const Tensor w = weight.stride(1) == 1 || packed != nullptr ? weight : weight.contiguous();
  const Tensor s = scale.contiguous(), b = bias ? bias->contiguous() : Tensor();
  const LinearInt8Forward call{.dtype = to_dtype(type),
                               .m = m,
                               .n = n,
                               .k = k,
                               .x_row_stride = k,
                               .w_row_stride = packed != nullptr ? k : w.stride(0),
                               .y_row_stride = n,
                               .with_bias = b.defined(),
                               .activation = activation,
                               .packed_w = packed != nullptr};
  run(call,
      {x.const_data_ptr(), packed != nullptr ? packed : w.const_data_ptr(), s.const_data_ptr<float>(), data_or_null(b),
       y.mutable_data_ptr()},
      at::kCPU, [&] { return record::Row{kLinearInt8, "", record::shapes_of({input, weight, b}), dtype_name(type)}; });
  return y;
}

// ---- the general door

template <class Int>
Tensor linear_int8_forward_op(const Tensor& input, const Tensor& weight, const Tensor& scale,
                              const optional<Tensor>& bias) {
  if constexpr (is_symbolic<Int>)
    return new_output<Int>(input, weight, scale, bias);
  else
    return run_forward(input, weight, scale, bias, {}, nullptr);
}

// ---- the fast door: weights that stay packed until they change

class Int8Weight {
 public:
  // NotImplemented for what is not plain, or is recorded for autograd.
  py::object call(py::handle input, py::handle weight, py::handle scale, py::handle bias, int kind, double a,
                  double b) {
    const bool has_bias = !bias.is_none();
    if (!fast_door::ambient_is_plain() || !fast_door::is_plain(input.ptr()) || !fast_door::is_plain(weight.ptr()) ||
        !fast_door::is_plain(scale.ptr()) || (has_bias && !fast_door::is_plain(bias.ptr())))
      return not_implemented();
    const Tensor &x = THPVariable_Unpack(input.ptr()), &w = THPVariable_Unpack(weight.ptr()),
                 &s = THPVariable_Unpack(scale.ptr());
    optional<Tensor> bias_tensor = has_bias ? optional<Tensor>(THPVariable_Unpack(bias.ptr())) : std::nullopt;
    const bool recorded = autograd_records() && (needs_grad(x) || (has_bias && needs_grad(*bias_tensor)));
    if (!x.is_cpu() || at::autocast::is_autocast_enabled(at::kCPU) || recorded ||
        !has_quantized_kernel(x.scalar_type()))
      return not_implemented();
    if (has_bias && bias_tensor->scalar_type() != x.scalar_type()) return not_implemented();
    const at::AutoDispatchBelowADInplaceOrView guard;
    return wrap(without_gil([] { return kLinearInt8; },
                            [&] {
                              const Tensor keep = packed(w);
                              return run_forward(x, w, s, bias_tensor, make_activation(kind, a, b),
                                                 keep.defined() ? keep.const_data_ptr() : nullptr);
                            },
                            x, w));
  }

  int64_t packed_bytes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return packed_.defined() ? packed_.numel() : 0;
  }

 private:
  // The weight as this tier's kernels want it; undefined for one that no call takes.
  Tensor packed(const Tensor& weight) {
    if (weight.scalar_type() != at::kChar || weight.dim() != 2 || weight.numel() == 0 || !weight.is_cpu()) return {};
    Fingerprint now;
    now.mix(weight);
    const KernelTable& tier = integer_kernels();
    const std::lock_guard<std::mutex> lock(mutex_);
    if (packed_.defined() && now.value == fingerprint_ && tier_ == &tier) return packed_;
    const Tensor w = weight.contiguous();
    const auto plan = tier.planners.plan(LinearInt8Forward{.dtype = DType::f32,
                                                           .m = 1,
                                                           .n = w.size(0),
                                                           .k = w.size(1),
                                                           .x_row_stride = w.size(1),
                                                           .w_row_stride = w.size(1),
                                                           .y_row_stride = w.size(0),
                                                           .packed_w = true});
    packed_ = empty_output({static_cast<int64_t>(plan.packed)}, at::kByte);
    plan.pack(w.const_data_ptr(), packed_.mutable_data_ptr());
    fingerprint_ = now.value;
    tier_ = &tier;
    return packed_;
  }

  std::mutex mutex_;
  Tensor packed_;
  uint64_t fingerprint_ = 0;
  const KernelTable* tier_ = nullptr;
};

}  // namespace

void implement_linear_int8(torch::Library& m, bool meta) {
  meta ? m.impl("linear_int8_forward", linear_int8_forward_op<c10::SymInt>)
       : m.impl("linear_int8_forward", linear_int8_forward_op<int64_t>);
}

void bind_linear_int8(py::module_& m) {
  py::class_<Int8Weight>(m, "Int8Weight")
      .def(py::init<>())
      .def("__call__", &Int8Weight::call)
      .def("packed_bytes", &Int8Weight::packed_bytes);
}

}  // namespace fastops
