#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/ops/scaled_dot_product_attention_native.h>

#include <cmath>

#include "aten.h"
#include "attention.h"

namespace fastops::aten {
namespace {

// Whether these are what PyTorch's kernel that does not form the scores takes, whose result has the strides of ours:
// (batch, heads, length, size), the same batch, heads and size, and contiguous rows.
bool fits(const Tensor& query, const Tensor& key, const Tensor& value) {
  if (query.dim() != 4 || key.dim() != 4 || query.numel() == 0 || key.numel() == 0) return false;
  if (key.sizes().slice(0, 2) != query.sizes().slice(0, 2) || key.size(3) != query.size(3)) return false;
  if (!attention_pays(query.size(2), key.size(2))) return false;
  return value.sizes() == key.sizes() && query.stride(3) == 1 && key.stride(3) == 1 && value.stride(3) == 1;
}

// Whether a mask, of bool or added to the scores, is broadcastable to (batch, heads, queries, keys) and asks for no
// gradient.
bool fits_mask(const Tensor& mask, const Tensor& query, const Tensor& key) {
  const bool of_bool = mask.scalar_type() == at::kBool && mask.is_cpu() && mask.layout() == at::kStrided;
  if (mask.requires_grad() || mask.dim() < 2 || mask.dim() > 4 || !(of_bool || takes_recorded(mask))) return false;
  if (!of_bool && mask.scalar_type() != query.scalar_type()) return false;
  const std::array<int64_t, 4> full{query.size(0), query.size(1), query.size(2), key.size(2)};
  for (int64_t i = 0; i < mask.dim(); ++i)
    if (mask.size(i) != 1 && mask.size(i) != full[static_cast<size_t>(4 - mask.dim() + i)]) return false;
  return true;
}

Tensor scaled_dot_product_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                    const optional<Tensor>& given_mask, double dropout_p, bool is_causal,
                                    optional<double> scale, bool enable_gqa) {
  // A user may forbid all kernels but those that form the scores.
  if (takes_recorded(query, key, value) && dropout_p == 0 && !enable_gqa && fits(query, key, value) &&
      at::globalContext().userEnabledFlashSDP()) {
    optional<Tensor> mask = defined(given_mask);
    if (!mask || (!is_causal && fits_mask(*mask, query, key))) {
      if (mask && mask->scalar_type() == at::kBool)
        mask = at::zeros(mask->sizes(), query.options()).masked_fill_(mask->logical_not(), -INFINITY);
      return attention_recorded(query, key, value, mask, is_causal,
                                scale.value_or(1 / std::sqrt(static_cast<double>(query.size(3)))));
    }
  }
  return at::native::scaled_dot_product_attention(query, key, value, given_mask, dropout_p, is_causal, scale,
                                                  enable_gqa);
}

}  // namespace

void override_attention(Overrides& overrides) {
  put<aten::scaled_dot_product_attention, at::native::scaled_dot_product_attention>(overrides.with_autograd,
                                                                                    "scaled_dot_product_attention");
}

}  // namespace fastops::aten
