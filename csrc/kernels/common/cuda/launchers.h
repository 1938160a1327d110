// The launchers. Each is defined beside its kernels in <stem>.cu; kernels.cu puts them into the table. kernels.h has
// their contracts.
#pragma once

#include "kernels.h"

namespace fastops::cuda {

Status activation_forward(const ActivationForward&, Stream);
Status activation_backward(const ActivationBackward&, Stream);
Status prelu_forward(const PreluForward&, Stream);
size_t prelu_backward_workspace(const PreluBackward&);
Status prelu_backward(const PreluBackward&, void* workspace, Stream);
Status glu_forward(const GluForward&, Stream);
Status glu_backward(const GluBackward&, Stream);

Status max_pool_forward(const MaxPoolForward&, Stream);
Status max_pool_backward(const MaxPoolBackward&, Stream);
Status avg_pool_forward(const AvgPoolForward&, Stream);
Status avg_pool_backward(const AvgPoolBackward&, Stream);

KernelName linear_forward_name(const LinearForward&);
size_t linear_forward_workspace(const LinearForward&);
Status linear_forward(const LinearForward&, void* workspace, Stream);
KernelName linear_backward_name(const LinearBackward&);
size_t linear_backward_workspace(const LinearBackward&);
Status linear_backward(const LinearBackward&, void* workspace, Stream);

bool mlp_applies(const MlpShape&);
KernelName mlp_name(const MlpShape&);
Status mlp_forward(const MlpForward&, Stream);
size_t mlp_backward_workspace(const MlpBackward&);
Status mlp_backward(const MlpBackward&, void* workspace, Stream);
KernelName conv_forward_name(const ConvForward&);
size_t conv_forward_workspace(const ConvForward&);
Status conv_forward(const ConvForward&, void* workspace, Stream);
KernelName conv_backward_input_name(const ConvBackwardInput&);
size_t conv_backward_input_workspace(const ConvBackwardInput&);
Status conv_backward_input(const ConvBackwardInput&, void* workspace, Stream);
KernelName conv_backward_weight_name(const ConvBackwardWeight&);
size_t conv_backward_weight_workspace(const ConvBackwardWeight&);
Status conv_backward_weight(const ConvBackwardWeight&, void* workspace, Stream);

}  // namespace fastops::cuda
