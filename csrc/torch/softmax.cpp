#include <ATen/ATen.h>
#include <ATen/WrapDimUtils.h>

#include "aten.h"
#include "binding.h"
#include "call.h"
#include "node.h"
#include "sizes.h"

namespace fastops {
namespace {

const char* softmax_name(bool log) { return log ? "log_softmax" : "softmax"; }

// A contiguous tensor around the dimension of a softmax.
struct SoftmaxShape {
  int64_t outer = 1, size = 1, inner = 1;
};

SoftmaxShape shape_of(const Tensor& tensor, int64_t dim) {
  SoftmaxShape shape;
  if (tensor.dim() == 0) return shape;
  const int64_t axis = at::maybe_wrap_dim(dim, tensor.dim());
  for (int64_t i = 0; i < axis; ++i) shape.outer *= tensor.size(i);
  shape.size = tensor.size(axis);
  for (int64_t i = axis + 1; i < tensor.dim(); ++i) shape.inner *= tensor.size(i);
  return shape;
}

Tensor softmax_forward(const Tensor& input, int64_t dim, bool log) {
  check_input(input, softmax_name(log), "input");
  at::maybe_wrap_dim(dim, input.dim());
  const Tensor x = input.contiguous();
  Tensor y = empty_output(x.sizes(), x.scalar_type(), x.device());
  if (y.numel() == 0) return y;
  const auto [outer, size, inner] = shape_of(x, dim);
  run(SoftmaxForward{to_dtype(x.scalar_type()), log, outer, size, inner}, {x.const_data_ptr(), y.mutable_data_ptr()},
      x.device(),
      [&] { return record::Row{softmax_name(log), {}, record::shapes_of({x}), dtype_name(x.scalar_type())}; });
  return y;
}

Tensor softmax_backward(const Tensor& grad_output, const Tensor& output, int64_t dim, bool log) {
  const std::string op = c10::str(softmax_name(log), "_backward");
  check_input(output, op.c_str(), "output");
  check_tensor(grad_output, op.c_str(), "grad_output", output.device());
  TORCH_CHECK(grad_output.scalar_type() == output.scalar_type() && grad_output.sizes() == output.sizes(), op,
              ": grad_output must have output's dtype and shape, ", output.scalar_type(), " and ", output.sizes(),
              ", got ", grad_output.scalar_type(), " and ", grad_output.sizes());
  at::maybe_wrap_dim(dim, output.dim());
  const Tensor g = grad_output.contiguous(), y = output.contiguous();
  Tensor grad_input = empty_output(y.sizes(), y.scalar_type(), y.device());
  if (y.numel() == 0) return grad_input;
  const auto [outer, size, inner] = shape_of(y, dim);
  run(SoftmaxBackward{to_dtype(y.scalar_type()), log, outer, size, inner},
      {g.const_data_ptr(), y.const_data_ptr(), grad_input.mutable_data_ptr()}, y.device(),
      [&] { return record::Row{op, {}, record::shapes_of({g, y}), dtype_name(y.scalar_type())}; });
  return grad_input;
}

// The same in torch's own differentiable ops, for a gradient that will be differentiated, or that is batched or dual.
Tensor differentiable_softmax_backward(const Tensor& grad_output, const Tensor& output, int64_t dim, bool log) {
  const auto type = output.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor g = grad_output.to(type), y = output.to(type);
  const auto sum = [&](const Tensor& tensor) { return tensor.sum({dim}, /*keepdim=*/true); };
  return (log ? g - y.exp() * sum(g) : y * (g - sum(g * y))).to(output.scalar_type());
}

struct SoftmaxOp {
  struct Args {
    int64_t dim;
    bool log;
  };
  static std::string name(const Args& args) { return softmax_name(args.log); }
  static c10::IValue pack(const Args& args) { return std::vector<int64_t>{args.dim, args.log}; }
  static Args unpack(const c10::IValue& packed) {
    const auto values = packed.toIntVector();
    return {values[0], values[1] != 0};
  }
  // saved: output.
  static variable_list gradients(const Args& args, at::TensorList saved, const variable_list& grads, Needs needs) {
    if (!grads[0].defined() || !needs(0)) return {Tensor()};
    const bool direct = !at::GradMode::is_enabled() && fast_door::is_plain(grads[0]);
    return {(direct ? softmax_backward : differentiable_softmax_backward)(grads[0], saved[0], args.dim, args.log)};
  }
};

Tensor softmax(const Tensor& input, int64_t dim, bool log) {
  Tensor y = softmax_forward(input, dim, log);
  if (!is_recorded(input)) return y;
  const auto node = make_node<SoftmaxOp>({dim, log}, input);
  torch::autograd::set_history(y, node);
  save(node, y);
  return y;
}

// ---- the general door

template <class Int>
Tensor softmax_forward_op(const Tensor& input, int64_t dim, bool log) {
  if constexpr (!is_symbolic<Int>) return softmax_forward(input, dim, log);
  check_input(input, softmax_name(log), "input");
  at::maybe_wrap_dim(dim, input.dim());
  return new_tensor<Int>(sizes_as<Int>(input), input.scalar_type(), input.device());
}

template <class Int>
Tensor softmax_backward_op(const Tensor& grad_output, const Tensor& output, int64_t dim, bool log) {
  if constexpr (!is_symbolic<Int>) return softmax_backward(grad_output, output, dim, log);
  check_input(output, softmax_name(log), "output");
  return new_tensor<Int>(sizes_as<Int>(output), output.scalar_type(), output.device());
}

template <class Int>
void implement_softmax(torch::Library& m) {
  m.impl("softmax_forward", softmax_forward_op<Int>);
  m.impl("softmax_backward", softmax_backward_op<Int>);
}

// ---- the fast door. On a GPU softmax is on autocast's float32 list, unless it is given a dtype; on the CPU it is on
// none. What is to be cast is left to fastops/functional/_softmax.py, which knows.

py::object softmax_fast(py::handle input, py::handle dimension, bool log) {
  int64_t dim = 0;
  if (!read_int(dimension.ptr(), dim)) return not_implemented();
  if (!fast_door::ambient_is_plain() || !fast_door::is_plain(input.ptr())) return not_implemented();
  const Tensor& x = THPVariable_Unpack(input.ptr());
  const int64_t dims = std::max<int64_t>(x.dim(), 1);
  if (!is_supported(x.scalar_type()) || dim < -dims || dim >= dims) return not_implemented();
  if (!x.is_cpu() && x.element_size() == 2 && at::autocast::is_autocast_enabled(x.device().type()))
    return not_implemented();
  return wrap(without_gil([&] { return softmax_name(log); }, [&] { return fastops::softmax(x, dim, log); }, x));
}

py::object softmax_fast(py::handle input, py::handle dim) { return softmax_fast(input, dim, /*log=*/false); }
py::object log_softmax_fast(py::handle input, py::handle dim) { return softmax_fast(input, dim, /*log=*/true); }

}  // namespace

Tensor softmax_along(const Tensor& input, int64_t dim, bool log) { return softmax_forward(input, dim, log); }

Tensor softmax_gradient(const Tensor& grad_output, const Tensor& output, int64_t dim, bool log) {
  return softmax_backward(grad_output, output, dim, log);
}

void implement_softmax(torch::Library& m, bool meta) {
  meta ? implement_softmax<c10::SymInt>(m) : implement_softmax<int64_t>(m);
}

void bind_softmax(py::module_& m) {
  fast_def<static_cast<py::object (*)(py::handle, py::handle)>(&softmax_fast)>(m, "softmax");
  fast_def<&log_softmax_fast>(m, "log_softmax");
}

}  // namespace fastops
