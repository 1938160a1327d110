"""fastops.light.distill and its parts: against the formulas written out, and in loops of other people's."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import docs
import fastops
from fastops import light


def mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3))


# ---- losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4), (4,), (0, 4)])
@pytest.mark.parametrize(("temperature", "alpha"), [(4.0, 0.9), (1.0, 0.3), (2.5, 1.0), (3.0, 0.0)])
def test_loss_against_the_formula(shape, temperature, alpha):
    student = torch.randn(shape).double().requires_grad_()
    teacher = (3 * torch.randn(shape)).double().requires_grad_()
    targets = torch.randint(4, shape[:-1])
    p = (teacher.detach() / temperature).softmax(-1)
    q = (student / temperature).softmax(-1)
    rows = max(targets.numel(), 1)
    soft = temperature**2 * (p * (p / q).log()).sum() / rows
    hard = -student.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).sum() / rows
    wanted = alpha * soft + (1 - alpha) * hard
    loss = light.distillation_loss(student, teacher, targets, temperature, alpha)
    torch.testing.assert_close(loss, wanted)
    assert loss.shape == ()
    torch.testing.assert_close(torch.autograd.grad(loss, student), torch.autograd.grad(wanted, student))
    torch.testing.assert_close(light.distillation_loss(student, teacher, None, temperature, alpha), soft)
    assert teacher.grad is None


def test_rows_to_ignore_and_small_dtypes():
    student, teacher = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    targets = torch.randint(7, (2, 5))
    targets[0, 2:] = -100
    counted = targets != -100
    loss = light.distillation_loss(student, teacher, targets)
    torch.testing.assert_close(loss, light.distillation_loss(student[counted], teacher[counted], targets[counted]))
    assert float(light.distillation_loss(student, teacher, torch.full_like(targets, -100))) == 0
    low = light.distillation_loss(student.bfloat16(), teacher.bfloat16(), targets)
    assert low.dtype is torch.float32
    torch.testing.assert_close(low, loss, rtol=0.02, atol=0.02)
    extreme = torch.tensor([[1e4, 0.0], [0.0, -1e4]])
    assert light.distillation_loss(extreme, extreme, torch.tensor([0, 0])).isfinite()


ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: light.distillation_loss(ONES, torch.ones(2, 4)), r"one shape.*got \(2, 3\) and \(2, 4\)"),
        (
            lambda: light.distillation_loss(ONES, ONES, torch.zeros(3)),
            r"the shape \(2,\) of the logits without classes",
        ),
        (lambda: light.distillation_loss(ONES, ONES, temperature=0), "temperature must be more than 0, got 0"),
        (lambda: light.distillation_loss(ONES, ONES, alpha=2), "alpha must be from 0 to 1, got 2"),
        (lambda: light.feature_loss(ONES, torch.ones(2, 4)), r"shape \(2, 4\) of teacher, got \(2, 3\)"),
        (lambda: light.Distiller(mlp(4), mlp(4), features={"1": "1"}), "inputs must be given with features"),
        (lambda: light.Distiller(mlp(4), mlp(4), features={"1": "9"}, inputs=ONES), "'9', which is no module of the t"),
        (lambda: light.distill(mlp(4), mlp(4), []), "batches must have at least one batch"),
        (lambda: light.distill(mlp(4), mlp(4), iter([]), epochs=2), "to go through it more than once"),
    ],
)
def test_arguments(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_features_of_different_sizes():
    big, small = torch.randn(2, 8, 6, 6), torch.randn(2, 4, 3, 3, requires_grad=True)
    project = nn.Conv2d(4, 8, 1)
    wanted = F.adaptive_avg_pool2d(big, 3)
    error = (project(small) - wanted).square().mean() / wanted.square().mean()
    torch.testing.assert_close(light.feature_loss(small, big, project), error)
    assert float(light.feature_loss(torch.ones(2, 3), torch.zeros(2, 3))) > 0


# ---- loops -----------------------------------------------------------------------------------------------------------


def data(count: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(count, 8)
    return x, (x[:, :3] + x[:, 3:6].square()).argmax(1)


def test_a_student_comes_near_its_teacher():
    torch.manual_seed(0)
    x, targets = data()
    student, teacher = mlp(8), mlp(64)
    before = copy.deepcopy(teacher.state_dict())
    batches = [(x[i : i + 64], targets[i : i + 64]) for i in range(0, 256, 64)]
    optimizer = torch.optim.Adam(student.parameters(), 0.02)
    losses = light.distill(student, teacher, batches, optimizer, epochs=40, alpha=1.0)
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert not teacher.training
    assert student.training
    assert all(p.grad is None for p in teacher.parameters())
    alone = light.distill(mlp(8).eval(), teacher, [(x, None)], alpha=0.0)
    assert len(alone) == 1


def test_features_are_learnt_with_their_projections():
    torch.manual_seed(0)
    x = data()[0]
    student, teacher = mlp(6), mlp(32)
    distiller = light.Distiller(student, teacher, features={"2": "2", "3": "3"}, inputs=x, feature_weight=2.0)
    assert [type(one) for one in distiller.projections] == [nn.Linear, nn.Identity]
    assert [*distiller.state_dict()] == ["projections.0.weight", "projections.0.bias"]
    optimizer = torch.optim.Adam([*student.parameters(), *distiller.parameters()], 0.02)
    losses = [distiller.step(x, None, optimizer) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]
    assert all(parameter.grad is not None for parameter in (*student.parameters(), *distiller.parameters()))
    assert not any(module._forward_hooks for model in (student, teacher) for module in model.modules())
    student.eval()
    output = distiller.projections[0](student[:3](x))
    parts = [light.feature_loss(output, teacher[:3](x)), light.feature_loss(student(x), teacher(x))]
    wanted = light.distillation_loss(student(x), teacher(x)) + 2 * sum(parts) / 2
    torch.testing.assert_close(distiller(x), wanted)
    for other in (copy.deepcopy(distiller), pickle.loads(pickle.dumps(distiller))):
        torch.testing.assert_close(other(x), wanted)
        assert other.student is not student
    through = light.distill(mlp(6), teacher, [(x, None)], features={"2": "2"}, epochs=3)
    assert through[-1] < through[0]


def test_the_teacher_stays_in_eval_mode():
    x, targets = data(16)
    both = nn.ModuleDict({"student": mlp(4), "teacher": mlp(4)})
    distiller = light.Distiller(both["student"], both["teacher"])
    both.train()
    before = both["teacher"][1].running_mean.clone()
    distiller(x, targets).backward()
    assert torch.equal(both["teacher"][1].running_mean, before)
    assert int(both["student"][1].num_batches_tracked) == 1


def test_other_outputs_and_inputs():
    class Named(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(1))

        def forward(self, a, b):
            return {"value": self.net(a + b)}

    student, teacher = Named(2), Named(5)
    inputs = {"a": torch.randn(3, 1, 5, 5), "b": torch.randn(1, 5, 5)}
    loss = lambda ours, theirs, _: F.mse_loss(ours["value"], theirs["value"])  # noqa: E731
    distiller = light.Distiller(student, teacher, features={"net.1": "net.1"}, inputs=inputs, loss=loss)
    assert type(distiller.projections[0]) is nn.Conv2d
    wanted = F.mse_loss(student(**inputs)["value"], teacher(**inputs)["value"])
    assert distiller(inputs).item() > wanted.item()
    torch.testing.assert_close(light.Distiller(student, teacher, loss=loss)(tuple(inputs.values())), wanted)
    with pytest.raises(ValueError, match=r"must be tensors of as many dimensions, at least 2, got dict and dict"):
        light.Distiller(student, teacher, features={"": ""}, inputs=inputs)


def test_with_the_rest_of_fastops():
    torch.manual_seed(0)
    x, targets = data(64)
    teacher = mlp(64).eval()
    student = fastops.fuse(mlp(8))
    for one in (teacher, fastops.freeze(teacher), fastops.fuse(teacher)):
        losses = light.distill(student, one, [(x, targets)], epochs=5)
        assert losses[-1] < losses[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert light.Distiller(student, teacher)(x, targets).dtype is torch.float32


def test_in_lightning(tmp_path):
    pl = pytest.importorskip("lightning.pytorch")

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = mlp(6)
            self.distiller = light.Distiller(self.net, mlp(32), features={"2": "2"}, inputs=torch.ones(2, 8))

        def training_step(self, batch, _):
            return self.distiller(*batch)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 0.01)

    module = Module()
    before = copy.deepcopy(module.state_dict())
    assert sum(name.startswith("distiller") for name in before) == 2
    trainer = pl.Trainer(max_steps=3, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                         enable_model_summary=False, default_root_dir=tmp_path, accelerator="cpu")  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data(64)), 16))
    changed = [name for name, value in module.state_dict().items() if not torch.equal(value, before[name])]
    assert {"net.0.weight", "distiller.projections.0.weight"} <= {*changed}


def test_progress(capsys):
    light.distill(mlp(4), mlp(4), [(torch.randn(8, 8), None)], epochs=3, progress=True)
    lines = capsys.readouterr().err
    assert lines.endswith("\n")
    assert "\rdistil 3/3, loss " in lines
    light.distill(mlp(4), mlp(4), [(torch.randn(8, 8), None)])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["distill", "Distiller", "distillation_loss", "feature_loss"])
def test_docstrings(name):
    symbol = getattr(light, name)
    assert docs.missing_parts(symbol) == []
    assert docs.failed_examples(symbol, name) == ""
    assert name != "Distiller" or docs.failed_examples(symbol.step, "step") == ""
