"""fastops.lightning.FastOps: a callback for Lightning's Trainer, of the package lightning or pytorch_lightning.

It changes the classes of layers when a loop starts: after configure_model, after a checkpoint was loaded and after a
strategy wrapped or sharded the model, none of which then sees anything but PyTorch's layers.
"""

import importlib
import sys
from collections.abc import Callable
from statistics import median
from time import perf_counter
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fastops.fuse import FusionReport, fuse_forward, fuse_in_place, sharing_copy, unfuse
from fastops.replace import Report, Row, _replace, _restore, _swap

__all__ = ["FastOps"]


def _imported() -> ModuleType:
    """Lightning under the one of its two names that the process uses already, or that is installed."""
    for name in sorted(("lightning.pytorch", "pytorch_lightning"), key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):
                raise
    raise ModuleNotFoundError("fastops.lightning needs Lightning: pip install fastops[lightning]", name="lightning")


_lightning = _imported()

# Steps on each side of a trial that are not counted: in the first ones memory is allocated and code compiled.
_WARM_UP = 2


class FastOps(_lightning.Callback):
    """Trains, validates, tests and predicts with fastops' layers, and gives the model its own back at the end.

    Args:
        mode: "replace": layers are replaced, as by fastops.replace_. "fuse": also computed together, as by
            fastops.fuse, within each child of the LightningModule (self.net, say) and, in a training by one process,
            in its own forward. A forward that cannot be followed, or reads what Lightning changes, stays as it is.
        filter_fn: as in fastops.replace_, with names as in the LightningModule; for mode "replace".
        trial: the optimizer steps to measure with PyTorch's layers and with fastops', each. These are the first steps
            of the training, which take turns; no step is computed twice. The ratio of the medians is logged and shown
            in the progress bar as fastops_speedup. True is 10, False and 0 are none.

    Attributes:
        report: what replace_ or fuse reported, of the last loop that started; None before.
        speedup: the result of the last trial; None before.

    The report is logged where Lightning logs, on rank zero, as text where a logger takes text (TensorBoard), and as
    metrics, fastops/replaced and fastops/skipped. Checkpoints hold nothing of fastops. The layers are restored when
    fit, validate, test or predict ends, also by an exception.

    Raises: ValueError: an unknown mode, a filter_fn with "fuse", a negative trial. ModuleNotFoundError, on import:
        Lightning is not installed.
    Source: fastops' own. Shapes and dtypes: any, float32 or 16-bit by the Trainer's precision.

    >>> from lightning.pytorch import Trainer
    >>> from fastops.lightning import FastOps
    >>> trainer = Trainer(callbacks=[FastOps()], accelerator="cpu", logger=False)
    """

    def __init__(
        self,
        mode: str = "replace",
        filter_fn: Callable[[nn.Module, str], bool] | None = None,
        trial: bool | int = False,
    ) -> None:
        if mode not in ("replace", "fuse"):
            raise ValueError(f"FastOps: mode must be 'replace' or 'fuse', got {mode!r}")
        if mode == "fuse" and filter_fn is not None:
            raise ValueError(f"FastOps: filter_fn must be None with mode='fuse', got {filter_fn!r}")
        if trial < 0:
            raise ValueError(f"FastOps: trial must be a number of steps, 0 or more, got {trial!r}")
        self.mode, self.filter_fn, self.trial = mode, filter_fn, 10 if trial is True else int(trial)
        self.report: Report | None = None
        self.speedup: float | None = None
        self._layers: _Layers | None = None
        self._trial: _Trial | None = None

    # ---- Lightning's hooks -------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None:
        self._start(trainer, pl_module)
        if self.trial:
            self._trial = _Trial(self.trial, self._layers)

    def on_validation_start(self, trainer: Any, pl_module: nn.Module) -> None:
        self._start(trainer, pl_module)

    on_test_start = on_predict_start = on_validation_start

    def on_train_batch_start(self, trainer: Any, pl_module: nn.Module, batch: Any, batch_idx: int) -> None:
        if self._trial and batch_idx % trainer.accumulate_grad_batches == 0:
            self._trial.start(pl_module.device)

    def on_train_batch_end(self, trainer: Any, pl_module: nn.Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._trial and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._trial.stop(pl_module.device)
            if self._trial.is_over():
                self._tell_speedup(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
        if self._trial:
            _lightning.utilities.rank_zero_warn(
                f"FastOps: the trial of {self.trial} steps takes {2 * (self.trial + _WARM_UP)} optimizer steps, "
                f"and the training had {trainer.global_step}"
            )

    def on_exception(self, trainer: Any, pl_module: nn.Module, exception: BaseException) -> None:
        self._end()

    def teardown(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        self._end()

    # ---- what they do ------------------------------------------------------------------------------------------------

    def _start(self, trainer: Any, pl_module: nn.Module) -> None:
        if self._layers is not None:  # a validation within fit
            return
        self._layers = _Layers(pl_module)
        # Others call it through a wrapper, by a forward that they set on the module for that.
        whole = isinstance(trainer.strategy, _lightning.strategies.SingleDeviceStrategy)
        self.report = self._layers.change(self.mode, self.filter_fn, whole)
        _lightning.utilities.rank_zero_info(f"FastOps, mode {self.mode!r}:\n{self.report}")
        if trainer.is_global_zero:
            counts = {"fastops/replaced": len(self.report.replaced), "fastops/skipped": len(self.report.skipped)}
            if isinstance(self.report, FusionReport):
                counts["fastops/fused"] = len(self.report.fused)
            for logger in trainer.loggers:
                logger.log_metrics(counts, step=trainer.global_step)
                add_text = getattr(getattr(logger, "experiment", None), "add_text", None)
                if add_text is not None:
                    add_text("fastops", "\n".join(f"    {line}" for line in str(self.report).splitlines()))

    def _tell_speedup(self, trainer: Any, pl_module: nn.Module) -> None:
        plain, ours = self._trial.medians()
        self.speedup, self._trial = plain / ours, None
        _lightning.utilities.rank_zero_info(
            f"FastOps: a step takes {1000 * ours:.3g} ms, and {1000 * plain:.3g} ms with PyTorch's layers: "
            f"{self.speedup:.2f} times as fast (medians of {self.trial} steps)"
        )
        if not trainer.barebones:
            # Loggers are told below: what is logged here reaches them only every log_every_n_steps.
            pl_module.log("fastops_speedup", self.speedup, prog_bar=True, logger=False, rank_zero_only=True)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics({"fastops/speedup": self.speedup}, step=trainer.global_step)

    def _end(self) -> None:
        layers, self._layers, self._trial = self._layers, None, None
        if layers is not None:
            layers.restore()


class _Layers:
    """The modules of a LightningModule whose classes were changed, with both classes."""

    def __init__(self, pl_module: nn.Module) -> None:
        self.pl_module = pl_module
        self.changed: list[tuple[nn.Module, type, type]] = []
        self.hparams: dict[str, nn.Module] = {}

    def change(self, mode: str, filter_fn: Callable[[nn.Module, str], bool] | None, whole: bool) -> Report:
        # A network that save_hyperparameters() keeps is pickled into every checkpoint, with its classes.
        self.hparams = {key: value for key, value in self.pl_module.hparams.items() if isinstance(value, nn.Module)}
        for key, value in self.hparams.items():
            self.pl_module.hparams[key] = sharing_copy(value)
        before = [(module, type(module)) for module in self.pl_module.modules()]
        try:
            return _fuse(self.pl_module, whole) if mode == "fuse" else _replace(self.pl_module, filter_fn)[0]
        finally:
            self.changed = [(module, cls, type(module)) for module, cls in before if type(module) is not cls]

    def use(self, ours: bool) -> None:
        """Fastops' classes, or PyTorch's, for all modules whose class nobody else has changed since."""
        for module, theirs, fast in self.changed:
            now, then = (theirs, fast) if ours else (fast, theirs)
            if type(module) is now:
                _swap(module, then)

    def restore(self) -> None:
        self.use(True)
        for module, _, _ in self.changed:
            unfuse(module)
            _restore(module, "", Report())
        for child in self.pl_module.children():
            vars(child).pop("fastops_report", None)
        self.pl_module.hparams.update(self.hparams)


def _fuse(pl_module: nn.Module, whole: bool) -> FusionReport:
    """Each child on its own, as a step may call them one by one, and then the module's own forward."""
    report = FusionReport()
    for name, child in pl_module.named_children():
        # Without parameters there is nothing to fuse: an activation, a loss, a metric.
        fusable = next(child.parameters(), None) is not None
        one = fuse_in_place(child) if fusable else _replace(child, None)[0]
        for kind, rows in vars(one).items():
            getattr(report, kind).extend(
                Row(" + ".join(f"{name}.{part}".rstrip(".") for part in row.name.split(" + ")), *row[1:])
                for row in rows
            )
    if whole and type(pl_module).forward is not _lightning.LightningModule.forward:
        forward = fuse_forward(pl_module, _OF_LIGHTNING)
        grouped = {name for row in forward.fused for name in row.name.split(" + ")}
        told = grouped | {name for row in forward.apart for name in row.name.split(" + ")}
        for kind, rows in vars(report).items():
            known = told if kind in ("fused", "apart") else grouped
            rows[:] = [row for row in rows if not known & set(row.name.split(" + "))]
            rows.extend(getattr(forward, kind))
    return report


# What Lightning keeps in a module, and changes all the time: the trainer, the hook that runs.
_OF_LIGHTNING = frozenset(vars(_lightning.LightningModule())) - frozenset(vars(nn.Module()))


class _Trial:
    """Times of optimizer steps, by turns with PyTorch's layers and with fastops'."""

    def __init__(self, steps: int, layers: _Layers) -> None:
        self.steps, self.layers = steps, layers
        self.seconds: dict[bool, list[float]] = {False: [], True: []}
        self.ours, self.started = False, 0.0

    def start(self, device: torch.device) -> None:
        self.ours = len(self.seconds[True]) < len(self.seconds[False])
        self.layers.use(self.ours)
        self.started = _now(device)

    def stop(self, device: torch.device) -> None:
        self.seconds[self.ours].append(_now(device) - self.started)

    def is_over(self) -> bool:
        return len(self.seconds[True]) == self.steps + _WARM_UP

    def medians(self) -> tuple[float, float]:
        return median(self.seconds[False][_WARM_UP:]), median(self.seconds[True][_WARM_UP:])


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return perf_counter()
