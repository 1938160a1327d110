"""torch.nn.functional's linear, convolutions, pools and activations on fastops' kernels, with the same signatures.

What torch does not have: activation= of linear and the convolutions, fused into the kernel; conv_max_pool1d, 2d and
3d, which fuse the pool as well; and mlp, a chain of linear layers as one op.

What all functions share:

- Any strides and memory formats, empty tensors, and any leading dimensions where torch's function takes them.
- float32, float64, bfloat16 and float16; 16-bit types are accumulated in float32. Under CPU autocast linear, the
  convolutions and prelu compute in autocast's dtype, as in PyTorch.
- Forward, backward and double backward. The result does not depend on the number of threads.
- What fastops has no kernel for (complex, sparse, integers, other devices, tensor subclasses) goes to PyTorch's own op.
  fastops.record() shows such a call with kernel "aten".
- What PyTorch refuses is refused with the same exception type. The message names the argument, what was expected and
  what came.

Examples assume `import torch` and `import fastops.functional as FF`.
"""

# Every op has two doors, and the choice between them is made in this package and nowhere else. A plain eager tensor
# takes the fast door (fastops._C): one call, which does everything in C++ or answers NotImplemented. Then the general
# door (fastops/ops) is asked, which is for tensors and modes that have to see the op. PyTorch's own op comes last.

from fastops._modules import public

# The `__all__` of each module here. Type checkers and editors read __init__.pyi, which a build writes.
_public = public(__name__)
globals().update(_public)
__all__ = list(_public)
