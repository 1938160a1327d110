"""What planning a call on a GPU keeps: the second run asks the device for nothing; on the emulator: see gpu.py."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from gpu import DEVICE, EMULATED, configured, queries

import fastops.functional as FF

pytestmark = pytest.mark.skipif(not EMULATED, reason="the emulator counts what the runtime is asked")

# On a chip with one multiprocessor, products have large tiles, for which a kernel needs permission.
CALLS = {
    "activation": (FF.gelu, [(30, 40)]),
    "linear": (FF.linear, [(70, 33), (70, 33), (70,)]),
    "a gradient formed first": (partial(FF.linear, activation="gelu"), [(70, 33), (70, 33), (70,)]),
    "conv2d": (partial(FF.conv2d, padding=1), [(2, 8, 9, 9), (70, 8, 3, 3), (70,)]),
    "depthwise": (partial(FF.conv2d, groups=8), [(2, 8, 9, 9), (8, 1, 3, 3), (8,)]),
    "1x1": (FF.conv2d, [(70, 33, 1, 1), (70, 33, 1, 1), (70,)]),
    "batch_norm": (lambda x: FF.batch_norm(x, None, None, training=True), [(9, 2, 20, 20)]),
    "layer_norm": (lambda x, w, b: FF.layer_norm(x, (33,), w, b), [(900, 33), (33,), (33,)]),
    "mse_loss": (partial(FF.mse_loss, reduction="none"), [(900, 33), (900, 33)]),
    "max_pool2d": (partial(FF.max_pool2d, kernel_size=2), [(2, 3, 8, 8)]),
    "mlp": (lambda x, v, w: FF.mlp(x, [v, w], [None, None]), [(70, 100), (128, 100), (9, 128)]),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_second_run_asks_for_nothing(name):
    function, shapes = CALLS[name]

    def run():
        tensors = [torch.randn(shape).to(DEVICE).requires_grad_() for shape in shapes]
        y = function(*tensors)
        torch.autograd.grad(y, tensors, torch.randn(y.shape).to(DEVICE))

    for chip in (1, 5):  # two devices
        with configured(multiprocessors=chip, shared=227):
            run()
            queries()
            run()
            assert queries() == 0


def test_a_device_is_asked_once_and_each_kernel_once():
    """Further calls need new plans, not new answers."""
    with configured(multiprocessors=1, shared=101):  # no other test has this device
        queries()
        for m in (129, 130, 200, 257):
            x, w = torch.randn(m, 20), torch.randn(130, 20)
            y = FF.linear(x.to(DEVICE), w.to(DEVICE))
            torch.testing.assert_close(y.cpu(), F.linear(x, w), rtol=1e-4, atol=1e-4)
        assert queries() == 3  # multiprocessors, shared memory, a kernel's permission
