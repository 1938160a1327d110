"""Knowledge distillation: a small model learns what a large one says. fastops.light.distill and its parts."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastops.light._progress import Progress

__all__ = ["Distiller", "distill", "distillation_loss", "feature_loss"]

Loss = Callable[[Any, Any, Any], Tensor]


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor | None = None,
    temperature: float = 4.0,
    alpha: float = 0.9,
    ignore_index: int = -100,
) -> Tensor:
    """The loss of a student that learns from a teacher's soft targets and from the right classes.

    alpha T^2 KL(softmax(teacher / T), softmax(student / T)) + (1 - alpha) cross_entropy(student, targets)

    Args:
        student_logits, teacher_logits: (*, classes), of one shape and any floating dtype. It is computed in float32 at
            least. Gradients reach the student's alone.
        targets: (*), classes; None leaves the soft targets, whatever alpha is.
        temperature: T, which makes the teacher's smaller probabilities count; more than 0.
        alpha: how much the soft targets count, from 0 to 1.
        ignore_index: rows with this target count in neither part.

    Returns:
        A mean over all rows that count, as a tensor without dimensions; 0 where none does.

    Raises:
        ValueError: shapes do not fit, or temperature or alpha is not one of these.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015).

    >>> from fastops import light
    >>> logits = torch.tensor([[2.0, 0.0, -1.0]])
    >>> light.distillation_loss(logits, logits, torch.tensor([0]), alpha=1.0)
    tensor(0.)
    """
    if student_logits.shape != teacher_logits.shape or student_logits.dim() < 1:
        raise ValueError(
            "distillation_loss: student_logits and teacher_logits must have one shape (*, classes), got "
            f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    if targets is not None and targets.shape != student_logits.shape[:-1]:
        raise ValueError(
            f"distillation_loss: targets must have the shape {tuple(student_logits.shape[:-1])} of the logits without "
            f"classes, got {tuple(targets.shape)}"
        )
    _check(temperature, alpha)
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    student = student_logits.to(dtype).flatten(0, -2) if student_logits.dim() > 1 else student_logits.to(dtype)[None]
    teacher = teacher_logits.detach().to(dtype).reshape(student.shape)
    if targets is not None:
        targets = targets.reshape(-1)
        counted = (targets != ignore_index).unsqueeze(1)
        count = counted.sum().clamp(min=1)
    else:
        counted, count = torch.ones_like(student[:, :1], dtype=torch.bool), max(len(student), 1)
    logs = (F.log_softmax(one / temperature, 1) for one in (student, teacher))
    divergence = F.kl_div(*logs, reduction="none", log_target=True)
    soft = torch.where(counted, divergence, 0).sum() / count * temperature**2
    if targets is None:
        return soft
    hard = F.cross_entropy(student, targets, ignore_index=ignore_index, reduction="sum") / count
    return alpha * soft + (1 - alpha) * hard


def feature_loss(student: Tensor, teacher: Tensor, projection: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """How far features are from the teacher's: the mean square of the difference, by that of the teacher's.

    Args:
        student, teacher: (N, C, ...) or (N, T, C), of any floating dtype. Images of different sizes are averaged down
            to the smaller one. Gradients reach the student's and the projection's alone.
        projection: makes the student's channels the teacher's; None where they are as many.

    Returns:
        A tensor without dimensions.

    Raises:
        ValueError: shapes do not fit, projected and averaged.

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets" (2014).

    >>> from fastops import light
    >>> light.feature_loss(torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 8, 8))
    tensor(1.)
    """
    student, teacher = (student if projection is None else projection(student)), teacher.detach()
    if student.dim() == teacher.dim() and student.dim() > 3:
        size = [min(sizes) for sizes in zip(student.shape[2:], teacher.shape[2:], strict=True)]
        average = {4: F.adaptive_avg_pool2d, 5: F.adaptive_avg_pool3d}[student.dim()]
        student, teacher = (one if list(one.shape[2:]) == size else average(one, size) for one in (student, teacher))
    if student.shape != teacher.shape:
        raise ValueError(
            f"feature_loss: student must have the shape {tuple(teacher.shape)} of teacher, got {tuple(student.shape)}"
        )
    dtype = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.to(dtype), teacher.to(dtype)
    return F.mse_loss(student, teacher) / teacher.square().mean().clamp(min=torch.finfo(dtype).tiny)


class Distiller(nn.Module):
    """What a student learns from a teacher, as a loss for a loop of one's own:

        distiller = light.Distiller(student, teacher)
        optimizer = torch.optim.Adam([*student.parameters(), *distiller.parameters()])
        for images, targets in batches:
            distiller.step(images, targets, optimizer)

    In Lightning, training_step returns `self.distiller(*batch)`. Its parameters are the projections of features;
    student and teacher are no submodules of it. The teacher is in eval mode and gets no gradients.

    Args:
        student, teacher: modules that are called with the same inputs.
        temperature, alpha: as of distillation_loss.
        features: names of the student's modules, and of those of the teacher whose outputs theirs are to come near to.
            Where these have other numbers of channels, a learnt projection is between them.
        inputs: what to call both with, once, to see how large features are: a tensor of any shape and dtype that they
            take, a tuple of arguments or a dict of named ones. It is needed with features.
        feature_weight: how much the mean of the feature losses counts beside the rest.
        loss: loss(student_output, teacher_output, targets), in the place of distillation_loss: for models that give no
            logits (`lambda s, t, y: F.mse_loss(s, t)`) or give them as an attribute.

    Raises:
        TypeError: student or teacher is not a torch.nn.Module. ValueError: another argument is not one of these, or
        features names no module, or one that gives no tensor.

    Source: Hinton, Vinyals and Dean (2015); Romero et al., "FitNets" (2014).

    >>> from fastops import light
    >>> student = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
    >>> teacher = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))
    >>> x = torch.randn(5, 8)
    >>> distiller = light.Distiller(student, teacher, features={"1": "1"}, inputs=x)
    >>> distiller
    Distiller(
      (projections): ModuleList(
        (0): Linear(in_features=4, out_features=64, bias=True)
      )
    )
    >>> loss = distiller(x, torch.tensor([0, 1, 2, 0, 1]))
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        temperature: float = 4.0,
        alpha: float = 0.9,
        features: Mapping[str, str] | None = None,
        inputs: Any = None,
        feature_weight: float = 1.0,
        loss: Loss | None = None,
    ) -> None:
        super().__init__()
        for name, one in (("student", student), ("teacher", teacher)):
            if not isinstance(one, nn.Module):
                raise TypeError(f"Distiller: {name} must be a torch.nn.Module, got {type(one).__name__}")
        _check(temperature, alpha)
        self._models = (student, teacher)  # no submodules: they are saved, moved and trained by whoever has them
        self.temperature, self.alpha, self.feature_weight = temperature, alpha, feature_weight
        self.features, self._loss = dict(features or {}), loss
        self.projections = nn.ModuleList()
        teacher.eval()
        if self.features:
            self._make_projections(inputs)

    @property
    def student(self) -> nn.Module:
        return self._models[0]

    @property
    def teacher(self) -> nn.Module:
        return self._models[1]

    def forward(self, inputs: Any, targets: Tensor | None = None) -> Tensor:
        """The loss of a batch, with the gradients of the student and of the projections."""
        if self.teacher.training:  # somebody has put all of a larger module into training mode
            self.teacher.eval()
        with torch.no_grad():
            wanted, teacher_features = _called(self.teacher, self.features.values(), inputs)
        output, student_features = _called(self.student, self.features, inputs)
        if self._loss is not None:
            loss = self._loss(output, wanted, targets)
        else:
            loss = distillation_loss(output, wanted, targets, self.temperature, self.alpha)
        pairs = zip(student_features, teacher_features, self.projections, strict=True)
        found = [feature_loss(one, other, projection) for one, other, projection in pairs]
        return loss + self.feature_weight * sum(found) / len(found) if found else loss

    def step(self, inputs: Any, targets: Tensor | None, optimizer: torch.optim.Optimizer) -> float:
        """One step of the optimizer with the gradients of this batch alone; the loss before it.

        >>> from fastops import light
        >>> student, teacher = nn.Linear(8, 3), nn.Linear(8, 3)
        >>> optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        >>> loss = light.Distiller(student, teacher).step(torch.randn(5, 8), None, optimizer)
        """
        optimizer.zero_grad()
        loss = self(inputs, targets)
        loss.backward()
        optimizer.step()
        return loss.item()

    def _make_projections(self, inputs: Any) -> None:
        if inputs is None:
            raise ValueError("Distiller: inputs must be given with features, to see how large they are")
        for model, what, names in (
            (self.student, "student", self.features),
            (self.teacher, "teacher", self.features.values()),
        ):
            known = dict(model.named_modules())
            strange = [name for name in names if name not in known]
            if strange:
                raise ValueError(f"Distiller: features names {strange[0]!r}, which is no module of the {what}")
        modes = [(module, module.training) for module in self.student.modules()]
        try:
            self.student.eval()
            with torch.no_grad():
                ours = _called(self.student, self.features, inputs)[1]
                theirs = _called(self.teacher, self.features.values(), inputs)[1]
        finally:
            for module, mode in modes:
                module.training = mode
        for names, one, other in zip(self.features.items(), ours, theirs, strict=True):
            if (
                not isinstance(one, Tensor)
                or not isinstance(other, Tensor)
                or one.dim() != other.dim()
                or one.dim() < 2
            ):
                raise ValueError(
                    f"Distiller: features {names} must be tensors of as many dimensions, at least 2, got "
                    f"{_described(one)} and {_described(other)}"
                )
            self.projections.append(_projection(one, other))


def distill(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    optimizer: torch.optim.Optimizer | None = None,
    epochs: int = 1,
    temperature: float = 4.0,
    alpha: float = 0.9,
    features: Mapping[str, str] | None = None,
    feature_weight: float = 1.0,
    loss: Loss | None = None,
    progress: bool = False,
) -> list[float]:
    """Trains a small model, in place, to say what a large one says.

    Args:
        student, teacher: modules; the teacher is put into eval mode and not changed otherwise.
        batches: pairs of inputs, of any shape and dtype that both take, and targets, which may be None: a DataLoader,
            a list.
        optimizer: of the student's parameters; None is AdamW with its learning rate of 0.001. The projections of
            features are added to it as another group.
        epochs: how often to go through batches.
        temperature, alpha, features, feature_weight, loss: as of Distiller.
        progress: whether to write a line to the terminal.

    Returns:
        The mean loss of each epoch.

    Raises:
        TypeError, ValueError: as Distiller does; batches are none, or an iterator that more than one epoch needs anew.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015).

    >>> from fastops import light
    >>> student, teacher = nn.Linear(8, 3), nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))
    >>> losses = light.distill(student, teacher, [(torch.randn(32, 8), None)], epochs=20)
    >>> losses[-1] < losses[0]
    True
    """
    if type(epochs) is not int or epochs < 1:
        raise ValueError(f"distill: epochs must be a positive int, got {epochs!r}")
    if isinstance(batches, Iterator) and epochs > 1:
        raise ValueError("distill: batches must be a list, a DataLoader or the like, to go through it more than once")
    first = next(iter(batches), None) if not isinstance(batches, Iterator) else None
    if first is None and features:
        raise ValueError("distill: batches must have a first batch that can be looked at, when features are given")
    inputs = first[0] if features else None
    distiller = Distiller(student, teacher, temperature, alpha, features, inputs, feature_weight, loss)
    if optimizer is None:
        optimizer = torch.optim.AdamW(student.parameters())
    if any(True for _ in distiller.parameters()):
        optimizer.add_param_group({"params": [*distiller.parameters()]})
    modes = [(module, module.training) for module in student.modules()]
    student.train()
    line = Progress("distil", epochs, progress)
    means = []
    try:
        for _ in range(epochs):
            found = [distiller.step(inputs, targets, optimizer) for inputs, targets in batches]
            if not found:
                raise ValueError("distill: batches must have at least one batch")
            means.append(sum(found) / len(found))
            line.step(f"loss {means[-1]:.4g}")
    finally:
        for module, mode in modes:
            module.training = mode
    return means


def _called(model: nn.Module, names: Iterable[str], inputs: Any) -> tuple[Any, list[Any]]:
    """The output of a call, and those of the modules of these names."""
    found: dict[str, Any] = {}
    hooks = []
    names = list(names)
    for name in dict.fromkeys(names):

        def note(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            found[name] = output

        hooks.append(model.get_submodule(name).register_forward_hook(note))
    try:
        if isinstance(inputs, Mapping):
            output = model(**inputs)
        else:
            output = model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return output, [found.get(name) for name in names]


def _projection(one: Tensor, other: Tensor) -> nn.Module:
    """From the student's channels to the teacher's: the last dimension of vectors and tokens, dimension 1 of images."""
    tokens = one.dim() == 3 and one.shape[1] == other.shape[1]
    d = -1 if one.dim() == 2 or tokens else 1
    if one.shape[d] == other.shape[d]:
        return nn.Identity()
    options = {"device": one.device, "dtype": one.dtype}
    if d == -1:
        return nn.Linear(one.shape[-1], other.shape[-1], **options)
    return getattr(nn, f"Conv{one.dim() - 2}d")(one.shape[1], other.shape[1], 1, **options)


def _described(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _check(temperature: float, alpha: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be more than 0, got {temperature!r}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1, got {alpha!r}")
