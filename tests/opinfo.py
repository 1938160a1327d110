"""PyTorch's OpInfo database.

For each op and dtype it looks through the stack, with the source of every frame, for a unittest.TestCase, to which it
would tell the sample that fails. There is none here, and that was most of what samples cost.
"""

from torch.testing._internal import common_utils
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo import core

assert callable(core.extract_test_fn)
core.extract_test_fn = common_utils.extract_test_fn = lambda: None

__all__ = ["op_db"]
