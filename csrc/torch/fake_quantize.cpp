#include "../kernels/fake_quantize/fake_quantize.h"

#include <ATen/ATen.h>
#include <ATen/WrapDimUtils.h>

#include "binding.h"
#include "call.h"
#include "node.h"
#include "quantized.h"
#include "sizes.h"

namespace fastops {
namespace {

constexpr const char* kFakeQuantize = "fake_quantize";
constexpr const char* kBackward = "fake_quantize_backward";
constexpr const char* kLearned = "fake_quantize_learned_backward";

// How a kernel walks a dense tensor, see fake_quantize.h.
struct FakeShape {
  int64_t outer, inner, channels;
  bool by_column;
};

FakeShape shape_of(const Tensor& tensor, int64_t channels, optional<int64_t> axis) {
  if (channels == 1 || !axis) return {1, tensor.numel(), 1, false};
  const int64_t along = at::maybe_wrap_dim(*axis, tensor.dim());
  int64_t outer = 1, inner = 1;
  for (int64_t i = 0; i < tensor.dim(); ++i)
    if (i != along && tensor.size(i) != 1) (tensor.stride(i) > tensor.stride(along) ? outer : inner) *= tensor.size(i);
  if (inner == 1) return {outer, channels, channels, true};
  return {outer * channels, inner, channels, false};
}

bool is_whole(const Tensor& zero_point) { return !zero_point.is_floating_point(); }

void check_levels(int64_t low, int64_t high, const char* op) {
  TORCH_CHECK(-kMostFakeLevel <= low && low <= high && high <= kMostFakeLevel, op,
              ": quant_min must be at most quant_max, and both within +-", kMostFakeLevel, ", got ", low, " and ",
              high);
}

template <class Int>
void check_grid(const Tensor& input, const Tensor& scale, const Tensor& zero_point, optional<int64_t> axis,
                const char* op) {
  check_dense_on_cpu(input, input, op, "input");
  check_dense_on_cpu(scale, input, op, "scale");
  check_dense_on_cpu(zero_point, input, op, "zero_point");
  TORCH_CHECK(is_supported(input.scalar_type()), op, ": input must be float32, float64, bfloat16 or float16, got ",
              dtype_name(input.scalar_type()));
  TORCH_CHECK(scale.scalar_type() == at::kFloat, op, ": scale must be float32, got ", dtype_name(scale.scalar_type()));
  const auto type = zero_point.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kInt || type == at::kLong, op,
              ": zero_point must be int32, int64 or float32, got ", dtype_name(type));
  const auto sizes = sizes_as<Int>(scale), x = sizes_as<Int>(input);
  TORCH_CHECK(!sizes_differ(sizes_as<Int>(zero_point), sizes), op, ": zero_point must have scale's shape ", sizes,
              ", got ", sizes_as<Int>(zero_point));
  if (!axis) {
    TORCH_CHECK(sizes.empty() || (sizes.size() == 1 && !differ(sizes[0], Int(1))), op,
                ": scale must hold one number where there is no axis, got shape ", sizes);
    return;
  }
  const auto dims = static_cast<int64_t>(x.size());
  TORCH_CHECK_INDEX(-dims <= *axis && *axis < dims, op, ": axis must be between ", -dims, " and ", dims - 1,
                    " for an input of shape ", x, ", got ", *axis);
  const Int size = x[static_cast<size_t>(*axis < 0 ? *axis + dims : *axis)];
  TORCH_CHECK(sizes.size() == 1 && !differ(sizes[0], size), op, ": scale must have shape (", size,
              ",), a number for each index along axis ", *axis, ", got ", sizes);
}

template <class Int>
void check_backward(const Tensor& grad_output, const Tensor& like, const char* op, const char* name) {
  check_dense_on_cpu(grad_output, like, op, "grad_output");
  TORCH_CHECK(is_supported(grad_output.scalar_type()), op,
              ": grad_output must be float32, float64, bfloat16 or float16, got ",
              dtype_name(grad_output.scalar_type()));
  TORCH_CHECK(!sizes_differ(sizes_as<Int>(grad_output), sizes_as<Int>(like)), op,
              ": grad_output must have the shape of ", name, ", ", sizes_as<Int>(like), ", got ",
              sizes_as<Int>(grad_output));
}

Tensor empty_mask(const Tensor& y) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return at::empty_strided_symint(y.sym_sizes(), y.sym_strides(), y.options().dtype(at::kBool));
}

std::pair<Tensor, Tensor> fake_quantize_forward(const Tensor& input, const Tensor& scale, const Tensor& zero_point,
                                                int64_t low, int64_t high, optional<int64_t> axis, bool need_mask) {
  check_grid<int64_t>(input, scale, zero_point, axis, kFakeQuantize);
  check_levels(low, high, kFakeQuantize);
  const Tensor y = empty_result<int64_t>(input);
  const Tensor mask = need_mask ? empty_mask(y) : Tensor();
  if (y.numel() == 0) return {y, mask};
  const Tensor x = in_order(input, y.strides()), s = scale.contiguous(), z = zero_point.to(at::kFloat).contiguous();
  const FakeShape shape = shape_of(y, s.numel(), axis);
  const FakeQuantizeForward call{.dtype = to_dtype(x.scalar_type()),
                                 .outer = shape.outer,
                                 .inner = shape.inner,
                                 .channels = shape.channels,
                                 .by_column = shape.by_column,
                                 .whole_zero = is_whole(zero_point),
                                 .with_mask = need_mask,
                                 .low = static_cast<int>(low),
                                 .high = static_cast<int>(high)};
  run(call,
      {x.const_data_ptr(), s.const_data_ptr<float>(), z.const_data_ptr<float>(), y.mutable_data_ptr(),
       need_mask ? static_cast<uint8_t*>(mask.mutable_data_ptr()) : nullptr},
      at::kCPU,
      [&] { return record::Row{kFakeQuantize, "", record::shapes_of({input, scale}), dtype_name(x.scalar_type())}; });
  return {y, mask};
}

// Strides of a dense tensor in the memory order of this one.
SizeVector<int64_t> dense_strides(const Tensor& tensor) {
  return elementwise_strides<int64_t>(tensor.sizes(), {tensor.strides()});
}

Tensor fake_quantize_backward(const Tensor& grad_output, const Tensor& mask) {
  check_backward<int64_t>(grad_output, mask, kBackward, "mask");
  TORCH_CHECK(mask.scalar_type() == at::kBool, kBackward, ": mask must be bool, got ", dtype_name(mask.scalar_type()));
  const auto strides = dense_strides(mask);
  const Tensor grad_input = empty_output_strided(mask.sizes(), strides, grad_output.scalar_type());
  if (grad_input.numel() == 0) return grad_input;
  const Tensor g = in_order(grad_output, strides), inside = in_order(mask, strides);
  run(FakeQuantizeBackward{to_dtype(g.scalar_type()), 1, g.numel()},
      {g.const_data_ptr(), static_cast<const uint8_t*>(inside.const_data_ptr()), grad_input.mutable_data_ptr()},
      at::kCPU, [&] { return record::Row{kBackward, "", record::shapes_of({g}), dtype_name(g.scalar_type())}; });
  return grad_input;
}

std::array<Tensor, 3> fake_quantize_learned_backward(const Tensor& grad_output, const Tensor& input,
                                                     const Tensor& scale, const Tensor& zero_point, int64_t low,
                                                     int64_t high, optional<int64_t> axis,
                                                     std::array<bool, 3> output_mask) {
  check_grid<int64_t>(input, scale, zero_point, axis, kLearned);
  check_levels(low, high, kLearned);
  check_backward<int64_t>(grad_output, input, kLearned, "input");
  check_dtype(grad_output, input.scalar_type(), kLearned, "grad_output");
  const auto strides = dense_strides(input);
  const Tensor g = in_order(grad_output, strides), x = in_order(input, strides), s = scale.contiguous(),
               z = zero_point.to(at::kFloat).contiguous();
  Tensor grad_input = output_mask[0] ? empty_output_strided(x.sizes(), strides, x.scalar_type()) : Tensor();
  Tensor grad_scale = at::zeros(scale.sizes(), s.options()), grad_zero = at::zeros(scale.sizes(), s.options());
  const FakeShape shape = shape_of(x, s.numel(), axis);
  if (x.numel() > 0) {
    const FakeQuantizeLearnedBackward call{.dtype = to_dtype(x.scalar_type()),
                                           .outer = shape.outer,
                                           .inner = shape.inner,
                                           .channels = shape.channels,
                                           .by_column = shape.by_column,
                                           .whole_zero = is_whole(zero_point),
                                           .with_grad_x = output_mask[0],
                                           .low = static_cast<int>(low),
                                           .high = static_cast<int>(high)};
    run(call,
        {g.const_data_ptr(), x.const_data_ptr(), s.const_data_ptr<float>(), z.const_data_ptr<float>(),
         mutable_or_null(grad_input), grad_scale.mutable_data_ptr<float>(), grad_zero.mutable_data_ptr<float>()},
        at::kCPU,
        [&] { return record::Row{kLearned, "", record::shapes_of({g, x, scale}), dtype_name(x.scalar_type())}; });
  }
  return {grad_input, output_mask[1] ? grad_scale : Tensor(), output_mask[2] ? grad_zero : Tensor()};
}

// ---- autograd: straight through where the mask says, with scale and zero point as they are

struct FakeQuantizeOp {
  struct Args {};
  static std::string name(const Args&) { return kFakeQuantize; }
  static c10::IValue pack(const Args&) { return std::vector<int64_t>(); }
  static Args unpack(const c10::IValue&) { return {}; }
  // saved: the mask.
  static variable_list gradients(const Args&, at::TensorList saved, const variable_list& grads, Needs needs) {
    const Tensor& g = grads[0];
    if (!g.defined() || !needs(0)) return {Tensor()};
    if (!at::GradMode::is_enabled() && fast_door::is_plain(g)) return {fake_quantize_backward(g, saved[0])};
    return {at::where(saved[0], g, at::zeros({}, g.options()))};
  }
};

Tensor fake_quantize(const Tensor& input, const Tensor& scale, const Tensor& zero_point, int64_t low, int64_t high,
                     optional<int64_t> axis) {
  const bool recorded = is_recorded(input);
  const auto [y, mask] = fake_quantize_forward(input, scale, zero_point, low, high, axis, recorded);
  if (!recorded) return y;
  const auto node = make_node<FakeQuantizeOp>({}, input);
  torch::autograd::set_history(y, node);
  save(node, mask);
  return y;
}

// ---- the general door

template <class Int>
std::tuple<Tensor, Tensor> fake_quantize_forward_op(const Tensor& input, const Tensor& scale, const Tensor& zero_point,
                                                    int64_t quant_min, int64_t quant_max, optional<int64_t> axis,
                                                    bool need_mask) {
  const auto or_none = [&](const Tensor& mask) {
    return mask.defined() ? mask : at::empty({0}, input.options().dtype(at::kBool));
  };
  if constexpr (!is_symbolic<Int>) {
    const auto [y, mask] = fake_quantize_forward(input, scale, zero_point, quant_min, quant_max, axis, need_mask);
    return {y, or_none(mask)};
  }
  check_grid<Int>(input, scale, zero_point, axis, kFakeQuantize);
  check_levels(quant_min, quant_max, kFakeQuantize);
  const Tensor y = empty_result<Int>(input);
  return {y, or_none(need_mask ? empty_mask(y) : Tensor())};
}

template <class Int>
Tensor fake_quantize_backward_op(const Tensor& grad_output, const Tensor& mask) {
  if constexpr (!is_symbolic<Int>) return fake_quantize_backward(grad_output, mask);
  check_backward<Int>(grad_output, mask, kBackward, "mask");
  return new_tensor_strided<Int>(sizes_as<Int>(mask),
                                 elementwise_strides<Int>(sizes_as<Int>(mask), {strides_as<Int>(mask)}),
                                 grad_output.scalar_type(), grad_output.device());
}

template <class Int>
std::tuple<Tensor, Tensor, Tensor> fake_quantize_learned_backward_op(const Tensor& grad_output, const Tensor& input,
                                                                     const Tensor& scale, const Tensor& zero_point,
                                                                     int64_t quant_min, int64_t quant_max,
                                                                     optional<int64_t> axis,
                                                                     std::array<bool, 3> output_mask) {
  if constexpr (!is_symbolic<Int>)
    return or_empty(
        fake_quantize_learned_backward(grad_output, input, scale, zero_point, quant_min, quant_max, axis, output_mask),
        input);
  check_grid<Int>(input, scale, zero_point, axis, kLearned);
  check_backward<Int>(grad_output, input, kLearned, "input");
  const auto like_scale = [&] { return new_tensor<Int>(sizes_as<Int>(scale), at::kFloat, scale.device()); };
  std::array<Tensor, 3> grads;
  if (output_mask[0])
    grads[0] = new_tensor_strided<Int>(sizes_as<Int>(input),
                                       elementwise_strides<Int>(sizes_as<Int>(input), {strides_as<Int>(input)}),
                                       input.scalar_type(), input.device());
  if (output_mask[1]) grads[1] = like_scale();
  if (output_mask[2]) grads[2] = like_scale();
  return or_empty(grads, input);
}

template <class Int>
void implement_fake_quantize(torch::Library& m) {
  m.impl("fake_quantize_forward", fake_quantize_forward_op<Int>);
  m.impl("fake_quantize_backward", fake_quantize_backward_op<Int>);
  m.impl("fake_quantize_learned_backward", fake_quantize_learned_backward_op<Int>);
}

// ---- the fast door: scale and zero point have no gradient

py::object fake_quantize_fast(py::handle input, py::handle scale, py::handle zero_point, py::handle quant_min,
                              py::handle quant_max, py::handle axis) {
  int64_t low = 0, high = 0, along = 0;
  if (!fast_door::ambient_is_plain() || !fast_door::is_plain(input.ptr()) || !fast_door::is_plain(scale.ptr()) ||
      !fast_door::is_plain(zero_point.ptr()) || !read_int(quant_min.ptr(), low) || !read_int(quant_max.ptr(), high) ||
      (!axis.is_none() && !read_int(axis.ptr(), along)))
    return not_implemented();
  const Tensor &x = THPVariable_Unpack(input.ptr()), &s = THPVariable_Unpack(scale.ptr()),
               &z = THPVariable_Unpack(zero_point.ptr());
  if (!x.is_cpu() || !is_supported(x.scalar_type()) || (autograd_records() && (needs_grad(s) || needs_grad(z))))
    return not_implemented();
  const optional<int64_t> dim = axis.is_none() ? std::nullopt : optional<int64_t>(along);
  return wrap(without_gil([] { return kFakeQuantize; }, [&] { return fake_quantize(x, s, z, low, high, dim); }, x));
}

}  // namespace

void implement_fake_quantize(torch::Library& m, bool meta) {
  meta ? implement_fake_quantize<c10::SymInt>(m) : implement_fake_quantize<int64_t>(m);
}

void bind_fake_quantize(py::module_& m) { fast_def<&fake_quantize_fast>(m, "fake_quantize"); }

}  // namespace fastops
