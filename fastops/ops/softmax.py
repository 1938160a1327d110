"""The general door of softmax and log_softmax. The fast doors are _C.softmax and _C.log_softmax; both call
csrc/torch/softmax.cpp.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastops.ops import forward_mode, needs_function, register, supported, through

_ops = torch.ops.fastops


def supports(input: Tensor, dim: int) -> bool:
    dims = max(input.dim(), 1)
    return supported(input, on_gpu=True) and -dims <= dim < dims


def softmax(input: Tensor, dim: int, log: bool) -> Tensor:
    """The caller has checked `supports`."""
    return _forward(input, dim, log)


def _by_torch(input: Tensor, dim: int, log: bool) -> Tensor:
    return F.log_softmax(input, dim) if log else F.softmax(input, dim)


def _gradient(grad: Tensor, output: Tensor, dim: int, log: bool) -> Tensor:
    """softmax_backward in PyTorch's differentiable ops; 16-bit types in float32."""
    dtype = torch.promote_types(output.dtype, torch.float32)
    g, y = grad.to(dtype), output.to(dtype)
    if log:
        return (g - y.exp() * g.sum(dim, keepdim=True)).to(output.dtype)
    return (y * (g - (g * y).sum(dim, keepdim=True))).to(output.dtype)


class _Softmax(torch.autograd.Function):
    """(input, dim, log) -> output."""

    @staticmethod
    def forward(*args):
        return _ops.softmax_forward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, *ctx.args = inputs
        ctx.save_for_backward(output)
        ctx.save_for_forward(input)

    @staticmethod
    def backward(ctx, grad_output):
        differentiable = torch.is_grad_enabled() or needs_function()
        backward = _gradient if differentiable else _ops.softmax_backward
        return backward(grad_output, *ctx.saved_tensors, *ctx.args), None, None

    @staticmethod
    @forward_mode
    def jvp(ctx, saved, input_t, *_):
        dim, log = ctx.args
        y = F.softmax(saved[0], dim)
        mean_t = (y * input_t).sum(dim, keepdim=True)
        return input_t - mean_t if log else y * (input_t - mean_t)

    @staticmethod
    def vmap(info, in_dims, input, dim, log):
        input = input.movedim(in_dims[0], 0)
        if input.dim() == 1:  # of scalars
            return _forward(input.unsqueeze(1), 1, log).squeeze(1), 0
        return _forward(input, dim if dim < 0 else dim + 1, log), 0


class _SoftmaxBackward(torch.autograd.Function):
    """(grad_output, output, dim, log) -> grad_input."""

    @staticmethod
    def forward(*args):
        return _ops.softmax_backward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.dim, ctx.log = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, u):
        (g, y), dim = ctx.saved_tensors, ctx.dim
        if ctx.log:
            e = y.exp()
            return u - (u * e).sum(dim, keepdim=True), -u * e * g.sum(dim, keepdim=True), None, None
        of_g, of_u = (g * y).sum(dim, keepdim=True), (u * y).sum(dim, keepdim=True)
        return y * (u - of_u), u * (g - of_g) - g * of_u, None, None


_forward = through(_Softmax, _ops.softmax_forward)

register("softmax_forward", _Softmax, decomposition=_by_torch)
register("softmax_backward", _SoftmaxBackward)
