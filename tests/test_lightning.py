"""fastops.lightning.FastOps: Lightning trains as without it, on our kernels, and keeps nothing of it."""

import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from modes import ENVIRONMENT
from torch import nn
from training import assert_trained_alike

import docs
import fastops
import fastops.nn as fnn

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
INSTALLED = importlib.util.find_spec("lightning") is not None
needs_lightning = pytest.mark.skipif(not INSTALLED, reason="lightning is not installed: pip install fastops[lightning]")

if INSTALLED:
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    from fastops.lightning import FastOps

    sys.path.insert(0, str(EXAMPLES))
    import lightning_digits
    from lightning_digits import Digits, loaders

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*tensorboardX",
    "ignore:You defined a `validation_step`",
    "ignore:`isinstance\\(treespec",
)


def trainer(*callbacks, **options):
    defaults = {"max_steps": 6, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options = {**defaults, "enable_model_summary": False, "accelerator": "cpu", "log_every_n_steps": 1, **options}
    return pl.Trainer(callbacks=list(callbacks), **options)


def trained(*callbacks, model=None, **options):
    pl.seed_everything(0, verbose=False)
    model = Digits() if model is None else model()
    one = trainer(*callbacks, limit_val_batches=0, **options)
    with fastops.record() as calls:
        one.fit(model, loaders()[0])
    return model, calls


def kernels(calls):
    return {row.op for row in calls if row.kernel != "aten"}


def on_fastops(model):
    return [name for name, module in model.named_modules() if type(module).__module__.startswith("fastops")]


class Probe:
    """A callback that looks at the model from outside in the middle of a training."""

    def __new__(cls, look):
        class Looks(pl.Callback):
            def on_train_batch_end(self, trainer, pl_module, *_):
                look(trainer, pl_module)

        return Looks()


# ---- training --------------------------------------------------------------------------------------------------------


@needs_lightning
@pytest.mark.parametrize("accumulate", [1, 3])
def test_trains_as_without(accumulate):
    options = {"accumulate_grad_batches": accumulate}
    theirs, none = trained(**options)
    exact, _ = trained(precision="64-true", **options)
    assert not none
    for mode in ("replace", "fuse"):
        ours, calls = trained(FastOps(mode), **options)
        assert {"conv2d_backward_weight", "linear_backward"} & kernels(calls) or mode == "fuse"
        assert kernels(calls)
        assert all(row.kernel != "aten" for row in calls)
        assert_trained_alike(ours, theirs, exact)
        assert on_fastops(ours) == []
        assert type(ours) is Digits


@needs_lightning
def test_bf16_mixed():
    theirs, _ = trained(precision="bf16-mixed")
    exact, _ = trained(precision="64-true")
    ours, calls = trained(FastOps(), precision="bf16-mixed")
    assert {row.dtype for row in calls if row.op == "linear"} == {"bfloat16"}
    assert_trained_alike(ours, theirs, exact)


@needs_lightning
@pytest.mark.parametrize("mode", ["replace", "fuse"])
@pytest.mark.parametrize("compiled", ["module", "net"])
def test_compiled(mode, compiled):
    """Compiled by backend "fastops", which generates nothing and so takes no time."""

    class Silent(Digits):  # Dynamo cannot trace Lightning's log (torch 2.13, Lightning 2.6), without fastops either
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_model(self):
            if compiled == "net" and isinstance(self.net, nn.Sequential):
                self.net = torch.compile(self.net, backend="fastops")

    theirs, _ = trained(model=Silent if compiled == "module" else Digits)
    exact, _ = trained(precision="64-true")
    torch._dynamo.reset()
    make = Silent if compiled == "net" else lambda: torch.compile(Silent(), backend="fastops")
    ours, calls = trained(FastOps(mode), model=make)
    ours = ours._orig_mod if compiled == "module" else ours
    assert {"conv_max_pool2d", "linear"} & kernels(calls)
    assert_trained_alike(ours, theirs, exact)
    assert on_fastops(ours) == []


@needs_lightning
def test_layers_that_configure_model_makes():
    class Late(Digits):
        def configure_model(self):
            if isinstance(self.net, nn.Sequential):
                torch.manual_seed(1)
                self.net = nn.ModuleDict({"layers": nn.Sequential(nn.Flatten(), nn.Linear(64, 10))})

        def forward(self, x):
            return self.net["layers"](x)

    callback = FastOps()
    model, calls = trained(callback, model=Late)
    assert [row.name for row in callback.report.replaced] == ["net.layers.1"]
    assert {"linear", "linear_backward"} <= kernels(calls)
    assert on_fastops(model) == []


@needs_lightning
@pytest.mark.parametrize("loop", ["validate", "test", "predict"])
def test_other_loops(loop):
    class Model(Digits):
        test_step = Digits.validation_step

        def predict_step(self, batch, batch_idx):
            return self(batch[0])

    def run(*callbacks):
        return getattr(trainer(*callbacks), loop)(model, loaders()[1], **options)

    torch.manual_seed(0)
    model, options = Model(), {} if loop == "predict" else {"verbose": False}
    with fastops.record() as calls:
        results = run(FastOps())
    assert {"conv2d", "linear"} <= kernels(calls)
    plain = run()
    if loop == "predict":
        torch.testing.assert_close(results, plain)
    else:
        assert results[0]["accuracy"] == pytest.approx(plain[0]["accuracy"], abs=0.003)  # one image of 360
    assert on_fastops(model) == []


@needs_lightning
def test_filter_and_report():
    callback = FastOps(filter_fn=lambda module, name: name != "net.6")
    seen = []
    trained(callback, Probe(lambda _, pl_module: seen.append(on_fastops(pl_module))))
    assert set(map(tuple, seen)) == {("net.0", "net.1", "net.2", "net.4", "net.5")}
    assert [(row.name, row.result) for row in callback.report.skipped] == [("net.6", "filter_fn said no")]
    callback = FastOps("fuse")
    trained(callback)
    assert ("net.4 + net.5 + net.6", "mlp(2 layers, activation='relu')") in [
        (row.name, row.result) for row in callback.report.fused
    ]


class Flat(Digits if INSTALLED else object):
    """Layers that are attributes, and functions between them."""

    def __init__(self):
        super().__init__()
        self.net, self.layer, self.last = (
            nn.Sequential(nn.Linear(64, 24), nn.ReLU()),
            nn.Linear(24, 16),
            nn.Linear(16, 10),
        )

    def forward(self, x):
        return self.last(torch.relu(self.layer(self.net(x.flatten(1)))))


@needs_lightning
def test_fuse_takes_the_forward_of_the_module_itself():
    options = {"max_epochs": 2, "max_steps": -1, "limit_train_batches": 4}  # Lightning changes its attributes meanwhile
    callback, classes = FastOps("fuse"), set()
    look = Probe(lambda _, pl_module: classes.add(type(pl_module).__name__))
    ours, calls = trained(callback, look, model=Flat, **options)
    [row] = callback.report.fused
    assert row.name == "net.0 + net.1 + layer + last"
    assert callback.report.replaced == []
    assert classes == {"FusedFlat"}
    assert kernels(calls) == {"mlp", "mlp_backward", "cross_entropy", "cross_entropy_backward"} & kernels(calls)
    assert len([row for row in calls if row.op == "mlp"]) == 8
    assert_trained_alike(
        ours, trained(model=Flat, **options)[0], trained(model=Flat, precision="64-true", **options)[0]
    )
    assert type(ours) is Flat
    assert on_fastops(ours) == []
    assert not any(key.startswith(("_fastops", "fastops")) for module in ours.modules() for key in vars(module))


@needs_lightning
def test_a_forward_that_reads_what_lightning_changes():
    class Reads(Flat):
        def forward(self, x):
            return super().forward(x) * (1 + self.current_epoch)

    options = {"max_epochs": 3, "max_steps": -1, "limit_train_batches": 2}
    ours, calls = trained(FastOps("fuse"), model=Reads, **options)
    assert kernels(calls)
    theirs, exact = (trained(model=Reads, precision=precision, **options)[0] for precision in ("32-true", "64-true"))
    assert_trained_alike(ours, theirs, exact)
    assert type(ours) is Reads


@needs_lightning
@pytest.mark.parametrize("mode", ["replace", "fuse"])
@pytest.mark.parametrize("first", [True, False])
def test_among_other_callbacks_and_resumed(mode, first, tmp_path):
    """Averaged weights, which are a copy of the module, and checkpoints; a new Trainer does the second half."""

    def half(ours, steps, precision, ckpt_path=None):
        pl.seed_everything(0, verbose=False)
        folder = tmp_path / f"{ours}-{precision}"
        others = [
            pl.callbacks.EMAWeightAveraging(decay=0.5),
            pl.callbacks.ModelCheckpoint(folder, every_n_train_steps=2, save_last=True),
            pl.callbacks.EarlyStopping("loss"),
        ]
        mine = [FastOps(mode)] if ours else []
        model, options = Digits(), {"precision": precision, "enable_checkpointing": True, "accumulate_grad_batches": 2}
        one = trainer(
            *([*mine, *others] if first else [*others, *mine]), max_steps=steps, limit_val_batches=1, **options
        )
        one.fit(model, *loaders(), ckpt_path=ckpt_path)
        return model, folder / "last.ckpt"

    results = []
    for ours, precision in ((True, "32-true"), (False, "32-true"), (False, "64-true")):
        _, path = half(ours, 2, precision)
        results.append(half(ours, 4, precision, path)[0])
    assert_trained_alike(*results)
    assert on_fastops(results[0]) == []


# ---- the end ---------------------------------------------------------------------------------------------------------


@needs_lightning
@pytest.mark.parametrize("mode", ["replace", "fuse"])
@pytest.mark.parametrize("raised", [RuntimeError, KeyboardInterrupt])
def test_restores_after_an_exception(mode, raised):
    models = []

    def look(_, pl_module):
        models.append(pl_module)
        assert on_fastops(pl_module) or any("Fused" in type(m).__name__ for m in pl_module.modules())
        raise raised("stop")

    with pytest.raises(SystemExit if raised is KeyboardInterrupt else raised):
        trained(FastOps(mode), Probe(look))
    assert {type(module).__module__.split(".")[0] for module in models[0].modules()} == {"torch", "lightning_digits"}
    assert {type(module).__name__ for module in models[0].net} == {"Conv2d", "ReLU", "MaxPool2d", "Flatten", "Linear"}


@needs_lightning
def test_leaves_alone_what_was_replaced_before():
    def replaced():
        model = Digits()
        fastops.replace_(model)
        return model

    model, _ = trained(FastOps(), model=replaced)
    assert len(on_fastops(model)) == 6


# ---- checkpoints -----------------------------------------------------------------------------------------------------


LOAD = """
import sys
sys.modules["fastops"] = None
import lightning.pytorch, torch
sys.path.insert(0, sys.argv[1])
from lightning_digits import Digits, loaders
for mode in ("replace", "fuse"):
    path = f"{sys.argv[2]}/{mode}.ckpt"
    assert all(name.startswith("ModelCheckpoint") for name in torch.load(path, weights_only=True)["callbacks"])
    model = Digits.load_from_checkpoint(path)
    net = torch.load(f"{sys.argv[2]}/{mode}-given.ckpt", weights_only=False)["hyper_parameters"]["net"]
    print(type(net), type(net[1]))
trainer = lightning.pytorch.Trainer(
    max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False
)
trainer.fit(model, loaders()[0], ckpt_path=path)
print(trainer.global_step)
"""


@needs_lightning
@pytest.mark.filterwarnings("ignore:.*is an instance of `nn.Module`")
def test_checkpoints_are_plain(tmp_path):
    """Also that of a network which save_hyperparameters keeps whole."""

    class Given(Digits):
        def __init__(self, net):
            super().__init__()
            self.save_hyperparameters()
            self.net = net

    def save(name):
        def look(trainer, _):
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / name, weights_only="given" in name)

        return Probe(look)

    for mode in ("replace", "fuse"):
        model, _ = trained(FastOps(mode), save(f"{mode}.ckpt"), enable_checkpointing=True, default_root_dir=tmp_path)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        given, _ = trained(FastOps(mode), save(f"{mode}-given.ckpt"), model=lambda net=net: Given(net))
        assert given.hparams["net"] is given.net is net
        loaded = Digits.load_from_checkpoint(tmp_path / f"{mode}.ckpt")
        assert on_fastops(loaded) == []
        assert list(loaded.state_dict()) == list(model.state_dict())
    run = subprocess.run(
        [sys.executable, "-c", LOAD, EXAMPLES, tmp_path], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert run.returncode == 0, run.stderr
    plain = "<class 'torch.nn.modules.container.Sequential'> <class 'torch.nn.modules.linear.Linear'>"
    # 23 batches an epoch, and the second epoch ends the training.
    assert run.stdout.splitlines()[-3:] == [plain, plain, "46"]


# ---- loggers and the trial -------------------------------------------------------------------------------------------


@needs_lightning
def test_csv_logger_and_trial(tmp_path):
    callback, shown, sides = FastOps(trial=2), [], []

    def look(trainer, pl_module):
        shown.append(trainer.progress_bar_metrics.get("fastops_speedup"))
        sides.append(bool(on_fastops(pl_module)))

    logger = CSVLogger(tmp_path)
    trained(callback, Probe(look), logger=logger, max_steps=12)
    assert sides == [False, True] * 4 + [True] * 4
    assert shown[:7] == [None] * 7
    assert shown[-1] == pytest.approx(callback.speedup, rel=1e-5)
    rows = (Path(logger.log_dir) / "metrics.csv").read_text()
    assert "fastops/speedup" in rows
    assert str(callback.speedup) in rows
    assert "fastops/replaced" in rows


@needs_lightning
def test_a_trial_with_accumulated_gradients_counts_steps():
    sides = []
    look = Probe(lambda _, pl_module: sides.append(bool(on_fastops(pl_module))))
    callback = FastOps("fuse", trial=1)
    trained(callback, look, max_steps=7, accumulate_grad_batches=2)
    assert sides == [False, False, True, True] * 3 + [True, True]
    assert callback.speedup > 0


@needs_lightning
def test_a_trial_needs_steps():
    with pytest.warns(UserWarning, match="the trial of 10 steps takes 24 optimizer steps, and the training had 6"):
        trained(FastOps(trial=True))


@needs_lightning
def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    callback = FastOps(trial=1)
    trained(callback, logger=logger)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert events.Scalars("fastops/speedup")[0].value == pytest.approx(callback.speedup, rel=1e-5)
    assert events.Scalars("fastops/replaced")[0].value == 6
    text = events.Tensors("fastops/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "fastops.nn.Conv2d" in text


@needs_lightning
def test_the_report_is_logged(monkeypatch):
    said = []
    monkeypatch.setattr(pl.utilities, "rank_zero_info", said.append)
    callback = FastOps(trial=1)
    trained(callback)
    assert said[0] == f"FastOps, mode 'replace':\n{callback.report}"
    assert f"{callback.speedup:.2f} times as fast" in said[1]


@needs_lightning
def test_example(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lightning_digits.main(["--trial", "3"])
    accuracy = re.search(r"^accuracy (0\.\d+)$", capsys.readouterr().out, re.MULTILINE)
    assert float(accuracy[1]) > 0.85


# ---- arguments, and what is missing ----------------------------------------------------------------------------------


@needs_lightning
def test_arguments():
    with pytest.raises(ValueError, match="mode must be 'replace' or 'fuse', got 'freeze'"):
        FastOps("freeze")
    with pytest.raises(ValueError, match="filter_fn must be None with mode='fuse'"):
        FastOps("fuse", filter_fn=lambda module, name: True)
    with pytest.raises(ValueError, match="trial must be a number of steps, 0 or more, got -1"):
        FastOps(trial=-1)


@needs_lightning
def test_documentation():
    assert docs.missing_parts(FastOps) == []
    assert docs.failed_examples(FastOps, "FastOps") == ""


@pytest.fixture
def imported_again(monkeypatch):
    """Imports fastops.lightning as if for the first time; afterwards it is what it was."""

    def again():
        monkeypatch.delitem(sys.modules, "fastops.lightning", raising=False)
        return importlib.import_module("fastops.lightning")

    monkeypatch.setattr(fastops, "lightning", getattr(fastops, "lightning", None), raising=False)
    return again


@needs_lightning
def test_under_the_other_name(imported_again, monkeypatch):
    """pytorch_lightning's Callback, where that is the package that is in use."""
    other = pytest.importorskip("pytorch_lightning")
    monkeypatch.delitem(sys.modules, "lightning.pytorch")
    callback = imported_again().FastOps()
    assert isinstance(callback, other.Callback)

    class Model(other.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 1)

        def training_step(self, batch, batch_idx):
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    options = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    model = Model()
    with fastops.record() as calls:
        other.Trainer(max_steps=2, callbacks=[callback], **options).fit(
            model, torch.utils.data.DataLoader(torch.randn(8, 4), 4)
        )
    assert kernels(calls) == {"linear", "linear_backward"}
    assert type(model.net) is nn.Linear


def test_layers_are_those_of_fastops():
    """What on_fastops looks for."""
    assert on_fastops(nn.Sequential(fnn.Linear(2, 2))) == ["0"]
