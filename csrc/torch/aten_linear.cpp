#include <ATen/ATen.h>
#include <ATen/CPUFunctions.h>
#include <ATen/ops/linear_native.h>

#include "aten.h"

namespace fastops::aten {
namespace {

using at::Scalar;

bool fits(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias) {
  return takes(input, weight) && (!bias || takes(input, *bias)) && linear_accepts(input, weight, bias);
}

Tensor linear(const Tensor& input, const Tensor& weight, const optional<Tensor>& given_bias) {
  const optional<Tensor> bias = defined(given_bias);
  if (takes_recorded(input, weight) && (!bias || takes_recorded(*bias)) && fits(input, weight, bias))
    return fastops::linear(input, weight, bias, {});
  return at::native::linear(input, weight, given_bias);
}

bool are_matrices(const Tensor& a, const Tensor& b) {
  return a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0) && takes(a, b);
}

Tensor mm(const Tensor& a, const Tensor& b) {
  if (are_matrices(a, b)) return matrix_product(a, b, std::nullopt);
  return pytorch("mm", a, [&] { return at::cpu::mm(a, b); });
}

Tensor addmm(const Tensor& bias, const Tensor& a, const Tensor& b, const Scalar& beta, const Scalar& alpha) {
  if (beta.equal(1) && alpha.equal(1) && are_matrices(a, b) && takes(a, bias) && bias.dim() == 1 &&
      bias.size(0) == b.size(1))
    return matrix_product(a, b, bias);
  return pytorch("addmm", a, [&] { return at::cpu::addmm(bias, a, b, beta, alpha); });
}

}  // namespace

void override_products(Overrides& overrides) {
  overrides.with_autograd.impl("linear", TORCH_FN(aten::linear));
  overrides.below_autograd.impl("mm", TORCH_FN(aten::mm));
  overrides.below_autograd.impl("addmm", TORCH_FN(aten::addmm));
}

}  // namespace fastops::aten
