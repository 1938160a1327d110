// What the library of a model that is only run has of each room: build_native.py has it included in front of
// everything.
#pragma once

#include "../activation/activation.h"
#include "../attention/attention.h"
#include "../batch_norm/batch_norm.h"
#include "../conv/conv.h"
#include "../conv_pool/conv_pool.h"
#include "../fake_quantize/fake_quantize.h"
#include "../layer_norm/layer_norm.h"
#include "../linear/linear.h"
#include "../loss/loss.h"
#include "../mlp/mlp.h"
#include "../optim/optim.h"
#include "../pool/pool.h"
#include "../softmax/softmax.h"
#include "../sparse_linear/sparse_linear.h"

#undef FASTOPS_CALLS_activation
#define FASTOPS_CALLS_activation(X) X(ActivationForward) X(PreluForward)
#undef FASTOPS_CALLS_attention
#define FASTOPS_CALLS_attention(X) X(AttentionForward)
#undef FASTOPS_CALLS_batch_norm
#define FASTOPS_CALLS_batch_norm(X) X(BatchNormForward)
#undef FASTOPS_CALLS_conv
#define FASTOPS_CALLS_conv(X) X(ConvForward)
#undef FASTOPS_CALLS_conv_pool
#define FASTOPS_CALLS_conv_pool(X) X(ConvPoolForward)
#undef FASTOPS_CALLS_fake_quantize
#define FASTOPS_CALLS_fake_quantize(X)
#undef FASTOPS_CALLS_layer_norm
#define FASTOPS_CALLS_layer_norm(X) X(LayerNormForward)
#undef FASTOPS_CALLS_linear
#define FASTOPS_CALLS_linear(X) X(LinearForward)
#undef FASTOPS_CALLS_loss
#define FASTOPS_CALLS_loss(X)
#undef FASTOPS_CALLS_mlp
#define FASTOPS_CALLS_mlp(X) X(MlpForward)
#undef FASTOPS_CALLS_optim
#define FASTOPS_CALLS_optim(X)
#undef FASTOPS_CALLS_pool
#define FASTOPS_CALLS_pool(X) X(MaxPoolForward) X(AvgPoolForward)
#undef FASTOPS_CALLS_softmax
#define FASTOPS_CALLS_softmax(X) X(SoftmaxForward)
#undef FASTOPS_CALLS_sparse_linear
#define FASTOPS_CALLS_sparse_linear(X) X(SparseLinearForward)
