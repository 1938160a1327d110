"""fastops' kernels under PyTorch's own operators: fastops.enable(), disable() and enabled()."""

from collections.abc import Iterator
from contextlib import contextmanager

from fastops import _C


def enable() -> None:
    """From here on, PyTorch's own operators run fastops' CPU kernels, in code that knows nothing of fastops.

    `F.linear`, `x @ w`, `torch.conv2d`, `torch.relu`, `F.max_pool2d` and so on, forward and backward, whoever calls
    them: functional code, torch.nn, other libraries, Keras on its torch backend. What fastops has no kernel for runs as
    before.

    The switch is the process's: it holds for all threads, also those that are computing, and forked processes inherit
    it. Calling it again changes nothing. A graph that torch.compile or torch.export makes is the same with and without
    it.

    What it takes: linear, mm, addmm (and with them matmul of a matrix), convolution, the pools, batch_norm, layer_norm,
    rms_norm, softmax, log_softmax, scaled_dot_product_attention, cross_entropy (rows and class indices), mse_loss, and
    relu, threshold, leaky_relu, elu, selu, celu, gelu, silu, mish, sigmoid, tanh, softplus, hardtanh, relu6,
    hardsigmoid, hardswish, hardshrink, softshrink and glu, in place too; float32, float64, bfloat16 and float16. out=
    stays PyTorch's. So do rms_norm and cross_entropy in inference mode, and 16-bit norms that are too small to gain.
    cross_entropy saves the logits, where PyTorch's saves their log_softmax: logits that are changed in place between
    loss and backward raise autograd's error.

    Raises nothing. Source: fastops' own; PyTorch's torch.library is how it is done.

    >>> fastops.enable()
    >>> with fastops.record() as calls:
    ...     y = torch.relu(torch.ones(3))
    >>> fastops.disable()
    >>> calls[0].op, calls[0].kernel != "aten"
    ('relu', True)
    """
    _C.enable(True)


def disable() -> None:
    """Takes back what enable() did: PyTorch's operators run PyTorch's kernels again.

    Blocks of enabled() that some thread is in keep them until they end. Raises nothing. Source: fastops' own.

    >>> fastops.disable()
    """
    _C.enable(False)


@contextmanager
def enabled() -> Iterator[None]:
    """What enable() does, for a block or, as a decorator, a function.

    Blocks nest and may overlap in several threads: PyTorch's kernels are back when the last one has ended, unless
    enable() has been called. Like enable(), it holds for all threads.

    Raises: what the block raises, which ends it. Source: fastops' own.

    >>> x, weight = torch.ones(16, 10), torch.ones(5, 10)
    >>> with fastops.enabled(), fastops.record() as calls:
    ...     y = torch.nn.functional.linear(x, weight)
    >>> calls[0].op, calls[0].shapes
    ('linear', '16x10, 5x10')
    """
    _C.enter_enabled()
    try:
        yield
    finally:
        _C.leave_enabled()
