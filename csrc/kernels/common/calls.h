// Every op that has kernels, in one list. Each contract ends in the list of its calls.
#pragma once

#include "../activation/activation.h"
#include "../attention/attention.h"
#include "../batch_norm/batch_norm.h"
#include "../conv/conv.h"
#include "../conv_int8/conv_int8.h"
#include "../conv_pool/conv_pool.h"
#include "../fake_quantize/fake_quantize.h"
#include "../inverted_residual/inverted_residual.h"
#include "../layer_norm/layer_norm.h"
#include "../linear/linear.h"
#include "../linear_int8/linear_int8.h"
#include "../loss/loss.h"
#include "../mlp/mlp.h"
#include "../optim/optim.h"
#include "../pool/pool.h"
#include "../pool_int8/pool_int8.h"
#include "../softmax/softmax.h"
#include "../sparse_linear/sparse_linear.h"
#include "../weight_only/weight_only.h"
#include "plan.h"

namespace fastops {

// clang-format off
#define FASTOPS_CALLS(X) \
  FASTOPS_CALLS_activation(X) \
  FASTOPS_CALLS_linear(X) \
  FASTOPS_CALLS_linear_int8(X) \
  FASTOPS_CALLS_weight_only(X) \
  FASTOPS_CALLS_mlp(X) \
  FASTOPS_CALLS_conv(X) \
  FASTOPS_CALLS_conv_int8(X) \
  FASTOPS_CALLS_conv_pool(X) \
  FASTOPS_CALLS_fake_quantize(X) \
  FASTOPS_CALLS_inverted_residual(X) \
  FASTOPS_CALLS_pool(X) \
  FASTOPS_CALLS_pool_int8(X) \
  FASTOPS_CALLS_batch_norm(X) \
  FASTOPS_CALLS_loss(X) \
  FASTOPS_CALLS_optim(X) \
  FASTOPS_CALLS_layer_norm(X) \
  FASTOPS_CALLS_softmax(X) \
  FASTOPS_CALLS_sparse_linear(X) \
  FASTOPS_CALLS_attention(X)
// clang-format on

#define FASTOPS_LISTED(Call) , Call*
template <class... Calls>
PlannersOf<Calls...> listed(void (*)(int, Calls*...));
using Planners = decltype(listed(static_cast<void (*)(int FASTOPS_CALLS(FASTOPS_LISTED))>(nullptr)));

}  // namespace fastops
