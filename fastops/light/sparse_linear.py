"""Linear layers and 1 x 1 convolutions that store and multiply the weights that are not zero."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

import fastops.nn as fnn
from fastops import _C
from fastops.functional._activation import Activation
from fastops.light._quantized import QuantizedLinear, activation_of, become
from fastops.ops.sparse_linear import by_torch, dense, sparse_linear

__all__ = ["Conv2d1x1Sparse", "LinearSparse"]

BLOCK_SIZES = ((1, 1), (1, 4), (4, 4), (16, 1))
_BUFFERS = ("crow_indices", "col_indices")


class _Sparse(QuantizedLinear):
    """What the two share. A subclass gives the size of W, and the dimension of the input that are its columns."""

    _buffer_names = _BUFFERS
    _dim: int
    block_size: tuple[int, int]
    values: nn.Parameter

    @property
    def _size(self) -> tuple[int, int]:
        """(n, k) of W."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """W as a dense tensor, (n, k), float32; gradients reach `values` through it."""
        return dense(self.crow_indices, self.col_indices, self.values, self._size)

    @property
    def density(self) -> float:
        """The part of W that is stored."""
        n, k = self._size
        return self.values.numel() / (n * k) if n * k > 0 else 0.0

    def dequantized(self) -> Tensor:
        return self.weight.detach()

    def _set(self, weight: Tensor) -> None:
        crow, col, values = compressed(weight.reshape(self._size), self.block_size)
        self.register_buffer("crow_indices", crow)
        self.register_buffer("col_indices", col)
        self.values = nn.Parameter(values)

    def _fast(self, input: Tensor, activation: tuple[int, float, float]) -> Any:
        indices = self.__dict__.get("_indices")
        if indices is None:
            indices = self.__dict__["_indices"] = _C.SparseIndices()
        tensors = self.crow_indices, self.col_indices, self.values, self.bias
        return indices(input, *tensors, self._size[0], self._dim, *activation)

    def _general(self, input: Tensor, bias: Tensor | None) -> Tensor:
        return sparse_linear(input, self.crow_indices, self.col_indices, self.values, bias, self._size[0], self._dim)

    def _by_torch(self, input: Tensor, bias: Tensor | None) -> Tensor:
        return by_torch(input, self.crow_indices, self.col_indices, self.values, bias, self._size[0], self._dim)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_indices"}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Sparse":
        values = self.values.data
        super()._apply(fn, recurse)
        if self.values.dtype != values.dtype:  # float32 stays, whatever the model is cast to
            self.values.data = values.to(self.values.device)
            if self.values.grad is not None:
                self.values.grad.data = self.values.grad.data.to(values.dtype)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        *_, error_msgs = args
        names = ("values", *_BUFFERS)
        loaded = [state_dict.get(f"{prefix}{name}") for name in names]
        if all(isinstance(tensor, Tensor) for tensor in loaded):
            values, crow, col = loaded
            problem = _problem(values, crow, col, self._size)
            if problem:
                error_msgs.append(f"{prefix.removesuffix('.') or type(self).__name__}: {problem}")
                return
            # A checkpoint may have kept other weights, and in other blocks.
            self.block_size = tuple(values.shape[1:]) or (1, 1)
            for name, tensor in zip(names, loaded, strict=True):
                mine = getattr(self, name)
                if mine.shape != tensor.shape:
                    mine.data = mine.data.new_empty(tensor.shape)
        elif f"{prefix}weight" in state_dict:
            error_msgs.append(f"{prefix}weight is dense: load it before sparsify_, or after densify_")
            return
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args)


class LinearSparse(_Sparse):
    """torch.nn.Linear with a sparse weight: y = f(x W^T + b), where only blocks of W that are not zero are stored.

    Single weights (block_size (1, 1), compressed sparse rows) are faster than fastops' dense layer from 60% zeros on,
    blocks of 4 x 4 and 16 x 1 from 15% on, where the zeros are whole blocks; docs/light.md has the figures. Gradients
    reach the input, the bias and the values that are kept: the layer can be trained on, and zeros stay zero.

    The indices are checked at the first call and again after they have changed; a few elements that are written
    through `.data` or NumPy go unnoticed, and then never lead out of the tensors' memory.

    Args:
        in_features, out_features: any.
        bias: whether there is one.
        block_size: (1, 1), (1, 4), (4, 4) or (16, 1): rows and columns of W. Sizes need not be multiples of it.
        activation: f, as in fastops.nn.Linear.

    A new one has no weight but zeros: `from_linear`, `sparsify_` and `load_state_dict` give it one.

    Attributes:
        values: (elements,), or (blocks, *block_size), float32, whatever the model is cast to; a parameter.
        crow_indices: (rows of blocks + 1), int32: where each row of blocks begins and ends in `values`; a buffer.
        col_indices: (blocks), int16, or int32 for more than 32767 columns of blocks; a buffer.
        bias: (out_features), in the model's dtype; a parameter, or None.
        weight: W, dense, computed when it is asked for.

    Shape:
        input (*, in_features), float32, bfloat16 or float16 -> (*, out_features) in input's dtype.

    Raises:
        ValueError: block_size is none of these. TypeError: from_linear gets another layer.
        RuntimeError: input's last dimension or dtype does not fit, it is not on the CPU, or the indices, perhaps those
            of a state_dict, are no sparse matrix.

    Source: the layouts are torch.sparse_csr and torch.sparse_bsr, with their names; Gale et al., "Sparse GPU Kernels
    for Deep Learning" (2020), for a batch in the lanes of vectors.

    >>> from fastops import light
    >>> linear = nn.Linear(64, 10)
    >>> torch.nn.utils.prune.l1_unstructured(linear, "weight", 0.9)
    Linear(in_features=64, out_features=10, bias=True)
    >>> layer = light.LinearSparse.from_linear(linear)
    >>> layer
    LinearSparse(in_features=64, out_features=10, bias=True, block_size=(1, 1), density=0.1)
    >>> layer(torch.randn(3, 64)).shape
    torch.Size([3, 10])
    """

    _dim = -1

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        block_size: tuple[int, int] = (1, 1),
        activation: Activation = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.block_size = checked_block_size(block_size)
        become(self, type(self), torch.zeros(out_features, in_features), activation)

    @classmethod
    def from_linear(cls, linear: nn.Module, block_size: tuple[int, int] = (1, 1)) -> "LinearSparse":
        """A sparse copy of a linear layer, fastops' with an activation too; it shares the bias. Nothing is rounded.

        >>> from fastops import light
        >>> light.LinearSparse.from_linear(fnn.Linear(8, 2, activation="relu"), block_size=(1, 4)).density
        1.0
        """
        return cls._copy_of(linear, block_size=block_size)

    @property
    def _size(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, block_size={self.block_size}, density={round(self.density, 3)}"


class Conv2d1x1Sparse(_Sparse):
    """torch.nn.Conv2d with kernels of 1 x 1, no groups and no padding, and a sparse weight: as LinearSparse for pixels.

    Images may be channels first or channels_last; the output is what the input is.

    Args:
        in_channels, out_channels: any.
        bias: whether there is one.
        stride: between the pixels that are taken, an int or a pair.
        block_size: as of LinearSparse.
        activation: f, as in fastops.nn.Conv2d.

    Attributes: as of LinearSparse; weight: (out_channels, in_channels, 1, 1).

    Shape:
        input (N, in_channels, H, W) or (in_channels, H, W), float32, bfloat16 or float16 -> (N, out_channels,
        ceil(H / stride), ceil(W / stride)) in input's dtype.

    Raises: what LinearSparse raises. Source: as of LinearSparse.

    >>> from fastops import light
    >>> layer = light.Conv2d1x1Sparse.from_conv(nn.Conv2d(8, 16, 1))
    >>> layer(torch.randn(2, 8, 5, 5)).shape
    torch.Size([2, 16, 5, 5])
    """

    _dim = 1

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        bias: bool = True,
        stride: int | tuple[int, int] = 1,
        block_size: tuple[int, int] = (1, 1),
        activation: Activation = None,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.stride = (stride, stride) if isinstance(stride, int) else tuple(stride)
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.block_size = checked_block_size(block_size)
        become(self, type(self), torch.zeros(out_channels, in_channels), activation)

    @classmethod
    def from_conv(cls, conv: nn.Module, block_size: tuple[int, int] = (1, 1)) -> "Conv2d1x1Sparse":
        """A sparse copy of a convolution, fastops' with an activation too; it shares the bias. Nothing is rounded.

        Raises:
            TypeError: conv is no 2-d convolution. ValueError: its kernels are not 1 x 1, or it has groups or padding.

        >>> from fastops import light
        >>> light.Conv2d1x1Sparse.from_conv(nn.Conv2d(8, 16, 1, stride=2, bias=False))
        Conv2d1x1Sparse(8, 16, bias=False, stride=(2, 2), block_size=(1, 1), density=1.0)
        """
        if not isinstance(conv, (nn.Conv2d, fnn.Conv2d)):
            raise TypeError(
                f"from_conv: conv must be a torch.nn.Conv2d or fastops.nn.Conv2d, got {type(conv).__name__}"
            )
        if not is_pointwise(conv):
            raise ValueError(f"from_conv: conv must have kernels of 1 x 1, no groups and no padding, got {conv}")
        layer = cls(conv.in_channels, conv.out_channels, False, conv.stride, block_size, activation_of(conv))
        layer.bias = conv.bias
        layer._set(conv.weight.detach())
        return layer.train(conv.training)

    @property
    def _size(self) -> tuple[int, int]:
        return self.out_channels, self.in_channels

    @property
    def weight(self) -> Tensor:
        """W as a dense tensor, (out_channels, in_channels, 1, 1), float32; gradients reach `values` through it."""
        return super().weight[..., None, None]

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            return super().forward(input)
        if not isinstance(input, Tensor) or input.dim() not in (3, 4):
            what = tuple(input.shape) if isinstance(input, Tensor) else type(input).__name__
            raise RuntimeError(f"Conv2d1x1Sparse: input must have shape (N, C, H, W) or (C, H, W), got {what}")
        images = input.unsqueeze(0) if input.dim() == 3 else input
        if self.stride != (1, 1):
            images = images[:, :, :: self.stride[0], :: self.stride[1]]
            if input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last):
                images = images.contiguous(memory_format=torch.channels_last)
        output = super().forward(images)
        return output.squeeze(0) if input.dim() == 3 else output

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, bias={self.bias is not None}, stride={self.stride}"
        if self.activation is not None:
            text += f", activation={self.activation!r}"
        return f"{text}, block_size={self.block_size}, density={round(self.density, 3)}"


def is_pointwise(conv: nn.Module) -> bool:
    """Whether a convolution is one of 1 x 1, without groups and padding."""
    padded = conv.padding not in ("same", "valid") and any(conv.padding)
    return tuple(conv.kernel_size) == (1, 1) and conv.groups == 1 and not padded


def checked_block_size(block_size: tuple[int, int]) -> tuple[int, int]:
    """The block size, as a tuple.

    Raises:
        ValueError: there is no kernel for it.
    """
    if not isinstance(block_size, (tuple, list)) or tuple(block_size) not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {', '.join(map(str, BLOCK_SIZES))}, got {block_size!r}")
    return tuple(block_size)


def kept_blocks(weight: Tensor, block_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The weight (n, k) as blocks (rows of blocks, columns of blocks, *block_size), padded with zeros, and which of
    them have an element that is not zero.
    """
    n, k = weight.shape
    rows, cols = block_size
    blocks = nn.functional.pad(weight, (0, -k % cols, 0, -n % rows))
    blocks = blocks.view(-(-n // rows), rows, -(-k // cols), cols).transpose(1, 2)
    return blocks, (blocks != 0).flatten(2).any(2)


# Tensors made in inference mode cannot be saved for a backward, nor loaded into.
@torch.inference_mode(False)
@torch.no_grad()
def compressed(weight: Tensor, block_size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """The weight (n, k) as crow_indices, col_indices and values."""
    blocks, kept = kept_blocks(weight.detach().float().contiguous(), block_size)
    row, col = kept.nonzero(as_tuple=True)
    crow = torch.zeros(kept.shape[0] + 1, dtype=torch.int32, device=weight.device)
    crow[1:] = kept.sum(1).cumsum(0)
    index = torch.int16 if kept.shape[1] <= torch.iinfo(torch.int16).max else torch.int32
    values = blocks[row, col]
    return crow, col.to(index), values.flatten() if block_size == (1, 1) else values


def _problem(values: Tensor, crow: Tensor, col: Tensor, size: tuple[int, int]) -> str:
    """Why tensors of a state_dict are no sparse matrix of this size; "" if they are."""
    if values.device.type == "meta" or crow.device.type == "meta" or col.device.type == "meta":
        return ""
    block_size = tuple(values.shape[1:]) or (1, 1)
    if block_size not in BLOCK_SIZES or (values.dim() == 3 and block_size == (1, 1)) or not values.is_floating_point():
        return f"values must be (elements,), or blocks of one of {BLOCK_SIZES[1:]}, got {tuple(values.shape)}"
    if crow.dtype != torch.int32 or col.dtype not in (torch.int16, torch.int32) or crow.dim() != 1 or col.dim() != 1:
        return "crow_indices must be a vector of int32, col_indices one of int16 or int32"
    rows, columns = (-(-length // block) for length, block in zip(size, block_size, strict=True))
    counts = crow.diff()
    if len(crow) != rows + 1 or len(col) != len(values) or crow[0] != 0 or crow[-1] != len(col) or (counts < 0).any():
        return (
            f"crow_indices must ascend in {rows + 1} steps from 0 to the number of col_indices and values, "
            f"{len(values)}, got {len(crow)} of them and {len(col)} col_indices"
        )
    if len(col) > 0 and (col.min() < 0 or col.max() >= columns):
        return f"col_indices must be from 0 to {columns - 1}, got {int(col.min())} to {int(col.max())}"
    row = torch.repeat_interleave(torch.arange(rows, device=counts.device), counts.long())
    if (torch.diff(row * columns + col) <= 0).any():
        return "col_indices must ascend in each row"
    return ""
