// The arguments of a convolution on the fast door.
#pragma once

#include "binding.h"

namespace fastops {

struct ConvArguments {
  int dims;
  bool transposed;
  py::handle stride, padding, dilation, output_padding, groups;
};

// The arguments as numbers; false where they are for PyTorch to read. (conv.cpp)
bool read_params(const ConvArguments& arguments, const Tensor& weight, ConvParams& params);

// call(input with a batch, weight, bias, plan) if the call is plain and its geometry good. It may refuse, too.
template <class Call>
py::object conv_call(const ConvArguments& arguments, py::handle input, py::handle weight, py::handle bias,
                     Call&& call) {
  return layer_fast(input, weight, bias, [&](const Tensor& x, const Tensor& w, const optional<Tensor>& bias_tensor) {
    ConvParams params{arguments.dims, arguments.transposed, 1, {1, 1, 1}, {}, {}, {1, 1, 1}};
    if (!read_params(arguments, w, params)) return not_implemented();
    const bool batched = x.dim() != params.dims + 1;
    const Tensor batch = batched ? x : x.unsqueeze(0);
    ConvPlan plan;
    if (!plan_conv(batch, w, bias_tensor, params, plan).empty()) return not_implemented();
    if (is_pytorchs(plan, x)) return not_implemented();
    return call(batch, w, bias_tensor, plan, [&](const Tensor& y) { return batched ? y : y.squeeze(0); });
  });
}

}  // namespace fastops
