#include <ATen/ATen.h>
#include <ATen/CPUFunctions.h>
#include <ATen/ops/linear_native.h>

#include "aten.h"

namespace fastops::aten {
namespace {

using at::Scalar;

Tensor linear(const Tensor& input, const Tensor& weight, const optional<Tensor>& given_bias) {
  if (takes_recorded(input, weight)) {
    const optional<Tensor> bias = defined(given_bias);
    if ((!bias || (takes(input, *bias) && takes_recorded(*bias))) && linear_accepts(input, weight, bias))
      return fastops::linear(input, weight, bias, {});
  }
  return at::native::linear(input, weight, given_bias);
}

bool are_matrices(const Tensor& a, const Tensor& b) {
  return takes(a, b) && a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0);
}

Tensor mm(const Tensor& a, const Tensor& b) {
  if (are_matrices(a, b)) return matrix_product(a, b, std::nullopt);
  return pytorch("mm", a, [&] { return at::cpu::mm(a, b); });
}

Tensor addmm(const Tensor& bias, const Tensor& a, const Tensor& b, const Scalar& beta, const Scalar& alpha) {
  if (are_matrices(a, b) && takes(a, bias) && bias.dim() == 1 && bias.size(0) == b.size(1) && beta.equal(1) &&
      alpha.equal(1))
    return matrix_product(a, b, bias);
  return pytorch("addmm", a, [&] { return at::cpu::addmm(bias, a, b, beta, alpha); });
}

}  // namespace

void override_products(Overrides& overrides) {
  put<aten::linear, at::native::linear>(overrides.with_autograd, "linear");
  put<aten::mm, at::cpu::mm>(overrides.below_autograd, "mm");
  put<aten::addmm, at::cpu::addmm>(overrides.below_autograd, "addmm");
}

}  // namespace fastops::aten
