// fastops.enable(): kernels of ours in the place of ATen's own CPU kernels, while something holds them there.
//
// Most are put in below autograd, at the CPU key: PyTorch records the call, transforms, traces and casts as it always
// does, and what arrives is plain data. A few ops that PyTorch composes of others (linear, the max pools) are taken
// whole, at the key AutogradCPU, where one node of ours stands for several of PyTorch's. They have no kernel at the key
// CPU: an exporter would take them for ops that are not to be decomposed.
//
// Every kernel is a function known at compile time, and so is the one of PyTorch's that it gives calls to which it
// does not take (at::cpu::, at::native::). So a call that another thread is in the middle of while the table changes
// ends in one or the other.
#pragma once

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "call.h"
#include "fast_door.h"
#include "ops.h"

namespace fastops {

// Whether the activations read this tensor where it lies: it is dense, or has evenly spaced contiguous rows. A result
// then has the strides that PyTorch's elementwise ops give theirs. (activation.cpp)
bool reads_in_place(const Tensor& input);
// Overwrites a dense tensor with f of it; no autograd. (activation.cpp)
void activate_dense(const Tensor& tensor, Activation activation);
// Whether the shapes of a linear layer fit. (linear.cpp)
bool linear_accepts(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias);
// a (m, k) times b (k, n), plus bias (n) if there is one; shapes and dtypes fit. No autograd. (linear.cpp)
Tensor matrix_product(const Tensor& a, const Tensor& b, const optional<Tensor>& bias);
// layer_norm over the last `dims` dimensions: y, mean and rstd; and the gradients of input, weight and bias. No
// autograd. (layer_norm.cpp)
std::array<Tensor, 3> layer_norm_with_statistics(const Tensor& input, const optional<Tensor>& weight,
                                                 const optional<Tensor>& bias, int64_t dims, double eps);
std::array<Tensor, 3> layer_norm_gradients(const Tensor& grad_output, const Tensor& input, const Tensor& mean,
                                           const Tensor& rstd, const optional<Tensor>& weight, int64_t dims,
                                           std::array<bool, 3> output_mask);
// rms_norm over the last `dims` dimensions, recorded for autograd. (layer_norm.cpp)
Tensor rms_norm_recorded(const Tensor& input, const optional<Tensor>& weight, int64_t dims, double eps);
// softmax or log_softmax along a dimension, and its gradient; no autograd. (softmax.cpp)
Tensor softmax_along(const Tensor& input, int64_t dim, bool log);
Tensor softmax_gradient(const Tensor& grad_output, const Tensor& output, int64_t dim, bool log);
// batch_norm: y, and in training mean and rstd of each channel; running statistics are updated. And the gradients of
// input, weight and bias. No autograd. (batch_norm.cpp)
std::array<Tensor, 3> batch_norm_with_statistics(const Tensor& input, const optional<Tensor>& weight,
                                                 const optional<Tensor>& bias, const optional<Tensor>& running_mean,
                                                 const optional<Tensor>& running_var, bool training, double momentum,
                                                 double eps);
std::array<Tensor, 3> batch_norm_gradients(const Tensor& grad_output, const Tensor& input,
                                           const optional<Tensor>& weight, const Tensor& mean, const Tensor& rstd,
                                           bool training, std::array<bool, 3> output_mask);
// Losses, with a reduction of at::Reduction: cross entropy, recorded for autograd, and nothing where there is no kernel
// for these operands; the mean squared error of operands of one shape, and its gradient of input. (loss.cpp)
optional<Tensor> cross_entropy_recorded(const Tensor& input, const Tensor& target, const optional<Tensor>& weight,
                                        int64_t reduction, int64_t ignore_index, double smoothing);
Tensor mse_loss_plain(const Tensor& input, const Tensor& target, int64_t reduction);
Tensor mse_loss_gradient(const Tensor& grad_output, const Tensor& input, const Tensor& target, int64_t reduction);
// Attention, recorded for autograd. (attention.cpp)
Tensor attention_recorded(const Tensor& query, const Tensor& key, const Tensor& value, const optional<Tensor>& mask,
                          bool causal, double scale);

namespace aten {

// The registrations of one enabling; they end with it.
struct Overrides {
  torch::Library below_autograd{torch::Library::IMPL, "aten", c10::DispatchKey::CPU, __FILE__, __LINE__};
  torch::Library with_autograd{torch::Library::IMPL, "aten", c10::DispatchKey::AutogradCPU, __FILE__, __LINE__};
};
void override_activations(Overrides& overrides);
void override_attention(Overrides& overrides);
void override_convolutions(Overrides& overrides);
void override_losses(Overrides& overrides);
void override_norms(Overrides& overrides);
void override_pools(Overrides& overrides);
void override_products(Overrides& overrides);

// Whether a tensor is dense data on the CPU, of a dtype that has kernels. Below autograd nothing else matters.
inline const uint64_t kDenseCpuKeys = fast_door::dense_keys(c10::DeviceType::CPU);
inline bool takes(const Tensor& tensor) {
  return is_supported(tensor.scalar_type()) && (tensor.key_set().raw_repr() & ~kDenseCpuKeys) == 0;
}
// The same for tensors that must have one dtype.
template <class... Tensors>
bool takes(const Tensor& first, const Tensors&... others) {
  return takes(first) && ((takes(others) && others.scalar_type() == first.scalar_type()) && ...);
}
// The bias of a call, which PyTorch's C++ callers may also give as an undefined tensor.
inline optional<Tensor> defined(const optional<Tensor>& bias) { return bias && bias->defined() ? bias : std::nullopt; }

// Whether autocast may yet cast this tensor in the ops that PyTorch composes the call of.
inline bool is_autocast(const Tensor& tensor) {
  return tensor.element_size() == 2 && at::autocast::is_autocast_enabled(at::kCPU);
}

// Whether a call at the key AutogradCPU is recorded by a node of ours: nobody looks on, and nothing is dual.
template <class... Tensors>
bool takes_recorded(const Tensors&... tensors) {
  return takes(tensors...) && fast_door::ambient_is_plain() && (!tensors._fw_grad(/*level=*/0).defined() && ...);
}

// What is registered for an op: ours for the dtypes that have kernels, else PyTorch's own, by a jump. Ours may still
// hand over. Most calls that are not taken differ in dtype, and they pay for nothing but the jump.
template <auto ours, auto original>
struct Detour;
template <class Result, class First, class... Rest, Result (*ours)(First, Rest...), Result (*original)(First, Rest...)>
struct Detour<ours, original> {
  static Result call(First first, Rest... rest) {
    if (is_supported(first.scalar_type()) || record::enabled()) [[likely]]
      return ours(first, rest...);
    return original(first, rest...);
  }
};
template <auto ours, auto original>
void put(torch::Library& library, const char* op) {
  library.impl(op, TORCH_FN((Detour<ours, original>::call)));
}

// PyTorch's own kernel, which record() shows.
template <class Call>
auto pytorch(const char* op, const Tensor& tensor, Call&& call) {
  if (!record::enabled()) [[likely]]
    return call();
  optional<decltype(call())> result;
  record::timed([&] { return record::Row{op, "aten", record::shapes_of({tensor}), dtype_name(tensor.scalar_type())}; },
                [&] { result = call(); });
  return *std::move(result);
}

}  // namespace aten
}  // namespace fastops
