// What Python sees: the schemas of torch.ops.fastops, and the module fastops._C, of which each file binds its part.
#include "binding.h"

namespace fastops {

TORCH_LIBRARY(fastops, m) {
  m.def(
      "linear_forward(Tensor input, Tensor weight, Tensor? bias, str activation, float a, float b, bool need_saved) -> "
      "(Tensor output, Tensor pre_activation)");
  m.def(
      "linear_backward(Tensor grad_output, Tensor? saved, Tensor input, Tensor weight, str activation, float a, float "
      "b, "
      "bool[3] output_mask) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "weight_only_forward(Tensor input, Tensor weight, Tensor scale, Tensor? offset, Tensor? bias, int group_size) -> "
      "Tensor");
  m.def(
      "sparse_linear_forward(Tensor input, Tensor crow_indices, Tensor col_indices, Tensor values, Tensor? bias, "
      "int out_features, int dim) -> Tensor");
  m.def(
      "sparse_linear_backward(Tensor grad_output, Tensor input, Tensor crow_indices, Tensor col_indices, "
      "Tensor values, int out_features, int dim, bool[2] output_mask) -> (Tensor grad_input, Tensor grad_values)");
  m.def("linear_int8_forward(Tensor input, Tensor weight, Tensor scale, Tensor? bias) -> Tensor");
  m.def(
      "conv_int8_forward(Tensor input, Tensor weight, Tensor scale, Tensor? bias, Tensor input_scale, Tensor "
      "input_zero, int[] stride, int[] padding, int[] dilation, int groups) -> Tensor");
  m.def(
      "fake_quantize_forward(Tensor input, Tensor scale, Tensor zero_point, int quant_min, int quant_max, int? axis, "
      "bool need_mask) -> (Tensor output, Tensor mask)");
  m.def("fake_quantize_backward(Tensor grad_output, Tensor mask) -> Tensor");
  m.def(
      "fake_quantize_learned_backward(Tensor grad_output, Tensor input, Tensor scale, Tensor zero_point, int "
      "quant_min, "
      "int quant_max, int? axis, bool[3] output_mask) -> (Tensor grad_input, Tensor grad_scale, Tensor "
      "grad_zero_point)");
  m.def(
      "conv_forward(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, "
      "bool transposed, int groups, str activation, float a, float b, bool need_saved) -> "
      "(Tensor output, Tensor pre_activation)");
  m.def(
      "conv_backward(Tensor grad_output, Tensor? saved, Tensor input, Tensor weight, int[] stride, int[] padding, "
      "int[] dilation, bool transposed, int groups, str activation, float a, float b, bool[3] output_mask) -> "
      "(Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "activation_forward(Tensor input, str activation, float a, float b, bool need_mask) -> (Tensor output, Tensor "
      "mask)");
  m.def(
      "activation_backward(Tensor grad_output, Tensor saved, str activation, float a, float b, str saved_kind) -> "
      "Tensor");
  m.def("activation_second_derivative(Tensor saved, str activation, float a, float b, str saved_kind) -> Tensor");
  m.def("prelu_forward(Tensor input, Tensor weight) -> Tensor");
  m.def(
      "prelu_backward(Tensor grad_output, Tensor input, Tensor weight, bool[2] output_mask) -> "
      "(Tensor grad_input, Tensor grad_weight)");
  m.def("glu_forward(Tensor input, int dim) -> Tensor");
  m.def("glu_backward(Tensor grad_output, Tensor input, int dim) -> Tensor");
  m.def(
      "batch_norm_forward(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? running_mean, "
      "Tensor? running_var, bool training, float momentum, float eps, str activation, float a, float b, "
      "bool need_stats) -> (Tensor output, Tensor stats, Tensor running_mean, Tensor running_var)");
  m.def(
      "batch_norm_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor? saved, Tensor "
      "stats, "
      "bool training, float eps, str activation, float a, float b, bool[4] output_mask) -> "
      "(Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)");
  m.def(
      "max_pool_forward(Tensor input, SymInt[] output_size, int[] kernel_size, int[] stride, int[] padding, "
      "int[] dilation, bool ceil_mode, str indices) -> (Tensor output, Tensor indices)");
  m.def(
      "max_pool_backward(Tensor grad_output, Tensor indices, SymInt[] input_size, int[] kernel_size, int[] stride, "
      "int[] padding, int[] dilation, bool ceil_mode, int dims, bool channels_last) -> Tensor");
  m.def(
      "max_pool_positions(Tensor indices, int[] input_size, int[] kernel_size, int[] stride, int[] padding, "
      "int[] dilation, bool ceil_mode, int dims) -> Tensor");
  m.def(
      "avg_pool_forward(Tensor input, SymInt[] output_size, int[] kernel_size, int[] stride, int[] padding, "
      "bool ceil_mode, bool count_include_pad, int divisor_override) -> Tensor");
  m.def(
      "avg_pool_backward(Tensor grad_output, SymInt[] input_size, int[] kernel_size, int[] stride, int[] padding, "
      "bool ceil_mode, bool count_include_pad, int divisor_override, int dims, bool channels_last) -> Tensor");
  m.def(
      "cross_entropy_forward(Tensor input, Tensor target, Tensor? weight, str reduction, int ignore_index, "
      "float label_smoothing) -> (Tensor output, Tensor statistics)");
  m.def(
      "cross_entropy_backward(Tensor grad_output, Tensor input, Tensor target, Tensor? weight, Tensor statistics, "
      "str reduction, int ignore_index, float label_smoothing) -> Tensor");
  m.def("mse_loss_forward(Tensor input, Tensor target, str reduction) -> Tensor");
  m.def(
      "mse_loss_backward(Tensor grad_output, Tensor input, Tensor target, str reduction, bool[2] output_mask) -> "
      "(Tensor grad_input, Tensor grad_target)");
  m.def(
      "layer_norm_forward(Tensor input, Tensor? weight, Tensor? bias, int dims, float eps, bool rms) -> (Tensor, "
      "Tensor, "
      "Tensor)");
  m.def(
      "layer_norm_backward(Tensor grad_output, Tensor input, Tensor mean, Tensor rstd, Tensor? weight, int dims, "
      "float "
      "eps, bool rms, bool[3] output_mask) -> (Tensor, Tensor, Tensor)");
  m.def(
      "attention_forward(Tensor query, Tensor key, Tensor value, Tensor? mask, bool causal, float scale) -> "
      "(Tensor, "
      "Tensor)");
  m.def(
      "attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor output, "
      "Tensor lse, bool causal, float scale, bool[3] output_mask) -> (Tensor, Tensor, Tensor)");
  m.def("softmax_forward(Tensor input, int dim, bool log) -> Tensor");
  m.def("softmax_backward(Tensor grad_output, Tensor output, int dim, bool log) -> Tensor");
}

// What each op's file gives torch.ops.fastops, kernels for a device or Meta kernels, and what each file gives
// fastops._C.
void implement_linear(torch::Library& m, bool meta);
void implement_linear_int8(torch::Library& m, bool meta);
void implement_weight_only(torch::Library& m, bool meta);
void implement_sparse_linear(torch::Library& m, bool meta);
void implement_conv(torch::Library& m, bool meta);
void implement_conv_int8(torch::Library& m, bool meta);
void implement_activation(torch::Library& m, bool meta);
void implement_fake_quantize(torch::Library& m, bool meta);
void implement_pool(torch::Library& m, bool meta);
void implement_batch_norm(torch::Library& m, bool meta);
void implement_loss(torch::Library& m, bool meta);
void implement_layer_norm(torch::Library& m, bool meta);
void implement_softmax(torch::Library& m, bool meta);
void implement_attention(torch::Library& m, bool meta);
void bind_linear(py::module_& m);
void bind_linear_int8(py::module_& m);
void bind_weight_only(py::module_& m);
void bind_sparse_linear(py::module_& m);
void bind_mlp(py::module_& m);
void bind_conv(py::module_& m);
void bind_conv_int8(py::module_& m);
void bind_conv_pool(py::module_& m);
void bind_frozen(py::module_& m);
void bind_activation(py::module_& m);
void bind_fake_quantize(py::module_& m);
void bind_pool(py::module_& m);
void bind_pool_int8(py::module_& m);
void bind_batch_norm(py::module_& m);
void bind_loss(py::module_& m);
void bind_optim(py::module_& m);
void bind_layer_norm(py::module_& m);
void bind_softmax(py::module_& m);
void bind_attention(py::module_& m);
void bind_record(py::module_& m);
void bind_memory(py::module_& m);
void bind_info(py::module_& m);
void bind_guard(py::module_& m);
void bind_aten(py::module_& m);

// All but composites of torch's own ops have CUDA kernels as well.
void implement(torch::Library& m, bool meta) {
  for (const auto function :
       {implement_linear, implement_linear_int8, implement_weight_only, implement_sparse_linear, implement_conv,
        implement_conv_int8, implement_activation, implement_fake_quantize, implement_pool, implement_batch_norm,
        implement_loss, implement_layer_norm, implement_softmax, implement_attention})
    function(m, meta);
}

TORCH_LIBRARY_IMPL(fastops, CUDA, m) { implement(m); }
TORCH_LIBRARY_IMPL(fastops, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(fastops, Meta, m) { implement(m, true); }

PYBIND11_MODULE(_C, m) {
  bind_linear(m);
  bind_linear_int8(m);
  bind_weight_only(m);
  bind_sparse_linear(m);
  bind_mlp(m);
  bind_conv(m);
  bind_conv_int8(m);
  bind_conv_pool(m);
  bind_frozen(m);
  bind_activation(m);
  bind_fake_quantize(m);
  bind_pool(m);
  bind_pool_int8(m);
  bind_batch_norm(m);
  bind_loss(m);
  bind_optim(m);
  bind_layer_norm(m);
  bind_softmax(m);
  bind_attention(m);
  bind_record(m);
  bind_memory(m);
  bind_info(m);
  bind_guard(m);
  bind_aten(m);
}

}  // namespace fastops
