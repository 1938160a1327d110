"""fastops.explain and `fastops doctor`: what they measure and say, and that they change nothing."""

import copy
import dataclasses
import html.parser
import re
import shutil
import subprocess
import sys

import pytest
import torch
from matplotlib.image import imread
from torch import nn

import fastops
from fastops import __main__ as command_line


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)
        self.group, self.fc = nn.GroupNorm(2, 8), nn.Linear(8, 3)

    def forward(self, x, scale=None):
        x = torch.relu(self.norm(self.conv(x)))
        x = self.group(x).mean((2, 3))
        return self.fc(x if scale is None else x * scale)


@pytest.fixture(scope="module")
def explanation():
    torch.manual_seed(0)
    return fastops.explain(Net(), torch.randn(4, 1, 12, 12), rounds=3)


def test_what_is_measured(explanation):
    modes = {mode: [way for way in explanation.ways if way.mode == mode] for mode in explanation.milliseconds}
    assert list(modes) == ["inference", "training step"]
    assert [way.name for way in modes["inference"]] == ["replace_", "enable", "fuse", "freeze", "backend"]
    assert [way.name for way in modes["training step"]] == ["replace_", "enable", "fuse", "backend"]
    assert all(milliseconds > 0 for milliseconds in explanation.milliseconds.values())
    for way in explanation.ways:
        assert not way.problem
        assert 0 < way.slowest <= way.ratio <= way.fastest
        assert way.milliseconds > 0
        assert way.difference < 1e-5
    assert [row.name for row in explanation.report.replaced] == ["conv", "norm", "fc"]
    assert {"conv2d", "batch_norm", "linear"} <= {row.op for row in explanation.calls}
    assert explanation.left()[0][1:] == ("1 x GroupNorm", "no fastops kernel")


def test_where_the_time_goes(explanation):
    assert set(explanation.shares) == {"", "conv", "norm", "group", "fc"}
    assert 0.5 < sum(explanation.shares.values()) <= 1.0
    assert [layer.share for layer in explanation.layers] == sorted(
        (s for s in explanation.shares.values()), reverse=True
    )
    assert {layer.kind for layer in explanation.layers} == {
        "Net itself",
        "Conv2d",
        "BatchNorm2d",
        "GroupNorm",
        "Linear",
    }


def test_time_of_a_module_is_without_what_it_calls():
    class Slow(nn.Module):
        def forward(self, x):
            return torch.linalg.svdvals(x @ x.mT).sum() + x

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(Slow(), nn.Identity())

        def forward(self, x):
            return self.inner(x)

    found = fastops.explain(Outer(), torch.randn(120, 120), ways=[], training=False, rounds=1)
    assert found.shares["inner.0"] > 0.5
    assert found.shares["inner"] < 0.3
    assert found.layers[0].kind == "Slow"


def test_nothing_is_changed():
    model, x = Net(), torch.randn(4, 1, 12, 12)
    model.fc.register_forward_hook(lambda module, args, output: output)
    before, classes = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    attributes = [dict(vars(module)) for module in model.modules()]
    state, threads, given = torch.get_rng_state(), torch.get_num_threads(), x.clone()
    fastops.explain(model, x, rounds=1, ways=["replace_", "fuse", "freeze"])
    assert [type(module) for module in model.modules()] == classes
    assert [dict(vars(module)) for module in model.modules()] == attributes
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert torch.equal(x, given)


def test_inputs_are_not_changed():
    class InPlace(nn.Linear):
        def forward(self, x, y):
            return super().forward(x["x"].mul_(2)) + y

    x, y = torch.randn(8, 4)[::2], torch.randn(4, requires_grad=True)
    given = x.clone()
    found = fastops.explain(InPlace(4, 4), {"x": x}, y, rounds=1, ways=["replace_"])
    assert "training step" in found.milliseconds
    assert torch.equal(x, given)
    assert y.grad is None


def test_text(explanation):
    lines = str(explanation).splitlines()
    assert len(lines) <= 16
    assert lines[0].startswith("Net, 4x1x12x12 float32; ")
    assert any(re.fullmatch(r"  freeze +[\d.e-]+ ms, [\d.]+ times as fast \([\d.]+ - [\d.]+\)", line) for line in lines)
    assert any(line.startswith("advice: ") for line in lines)
    assert re.search(r"^left to PyTorch: \d+% in 1 x GroupNorm: no fastops kernel$", str(explanation), re.MULTILINE)


def way(name, mode, ratio, slowest, problem=""):
    from fastops.explain import Way

    return Way(name, mode, 1.0, ratio, slowest, ratio + 0.1, 0.0, problem)


def test_advice(explanation):
    """The least change that is about as fast as the fastest; none that was slower in some round."""
    found = copy.copy(explanation)
    found.ways = [
        way("replace_", "inference", 1.50, 1.40),
        way("fuse", "inference", 1.51, 1.40),
        way("freeze", "inference", 3.00, 2.50, "but its results differ by 0.3"),
        way("replace_", "training step", 1.20, 0.95),
    ]
    assert found.best().name == "replace_"
    assert found.best("training step") is None
    assert found.advice() == ("fastops.replace_(model) for inference, 1.50 times as fast; nothing for training step")
    found.ways[0] = way("replace_", "inference", 1.50, 0.90)
    found.ways[1] = way("fuse", "inference", 1.51, 0.80)
    assert found.advice() == "leave the model as it is, nothing was faster in every round"
    found.ways[:2] = [way("replace_", "inference", 1.50, 1.40), way("fuse", "inference", 1.60, 1.50)]
    assert found.best().name == "fuse"


def test_arguments_by_name_and_modes_that_do_not_work():
    class Inference(Net):
        def forward(self, x, *, scale):
            if self.training:
                raise NotImplementedError("for inference alone")
            return super().forward(x, scale)

    found = fastops.explain(
        Inference(), torch.randn(4, 1, 12, 12), kwargs={"scale": torch.tensor(2.0)}, ways=["replace_"], rounds=1
    )
    assert list(found.milliseconds) == ["inference"]
    assert found.problems == {"training step": "NotImplementedError: for inference alone"}
    assert "training step: not measured, NotImplementedError: for inference alone" in str(found)
    assert "scalar float32" in found.inputs


def test_a_way_that_does_not_work_is_said(monkeypatch):
    def fails(model):
        raise RuntimeError("no such luck\nand more")

    monkeypatch.setattr(sys.modules["fastops.explain"], "fuse", fails)
    found = fastops.explain(nn.Linear(3, 4), torch.randn(2, 3), ways=["fuse"], rounds=1, training=False)
    assert [way.problem for way in found.ways] == ["RuntimeError: no such luck"]
    assert "fuse     not measured: RuntimeError: no such luck" in str(found)
    assert found.best() is None


def test_results_that_differ_are_said(monkeypatch):
    monkeypatch.setattr(sys.modules["fastops.explain"], "fuse", lambda model: nn.Sequential(model, nn.Softmax(1)))
    found = fastops.explain(nn.Linear(3, 4), torch.randn(2, 3), ways=["fuse"], rounds=1, training=False)
    assert found.ways[0].problem.startswith("but its results differ by ")
    assert found.best() is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_infinities_and_nan(value, monkeypatch):
    """Where PyTorch has them, too, they are no difference; elsewhere they are one."""

    class Spoils(nn.Module):
        def __init__(self, inner, column):
            super().__init__()
            self.inner, self.column = inner, column
            fastops.replace_(inner)

        def forward(self, x):
            return self.inner(x).index_fill(1, torch.tensor([self.column]), value)

    monkeypatch.setattr(sys.modules["fastops.explain"], "fuse", lambda model: Spoils(model, 1))
    for column, differs in ((1, False), (0, True)):
        model = Spoils(nn.Linear(3, 4), column)
        found = fastops.explain(model, torch.randn(2, 3), ways=["fuse"], rounds=1, training=False)
        assert found.ways[0].problem == ("but its results differ by inf" if differs else "")


@dataclasses.dataclass
class Output:
    scores: torch.Tensor
    note: str = ""


@pytest.mark.parametrize("outputs", ["dataclass", "dict", "complex"])
def test_outputs_of_other_kinds(outputs, monkeypatch):
    """They are compared, and give a loss."""

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, x):
            y = self.fc(x)
            if outputs == "dataclass":
                return Output(y)
            return {"loss": y.mean(), "classes": y.argmax(1)} if outputs == "dict" else torch.complex(y, y)

    def differs(model):
        with torch.no_grad():
            model.fc.bias.add_(1)
        return fastops.fuse(model)

    monkeypatch.setattr(sys.modules["fastops.explain"], "fuse", differs)
    found = fastops.explain(Named(), torch.randn(4, 6), rounds=1, ways=["replace_", "fuse"])
    assert not found.problems
    assert [way.problem[:22] for way in found.ways if way.mode == "inference"] == ["", "but its results differ"]


def test_a_way_in_which_no_kernel_ran_is_not_advised():
    found = fastops.explain(nn.Sequential(nn.GroupNorm(2, 4), nn.Sequential()), torch.randn(2, 4), rounds=1)
    assert {way.problem for way in found.ways} == {"but none of fastops' kernels ran"}
    assert found.advice() == "leave the model as it is, nothing was faster in every round"
    assert [what for _, what, _ in found.left()] == ["1 x GroupNorm"]  # and not a Sequential of nothing


def test_errors():
    x = torch.randn(4, 1, 12, 12)
    with pytest.raises(TypeError, match=r"explain: model must be a torch.nn.Module, got function"):
        fastops.explain(lambda x: x, x)
    with pytest.raises(ValueError, match=r"explain: ways must be among replace_, .*, got 'faster'"):
        fastops.explain(Net(), x, ways=["faster"])
    for rounds in (0, 1.5, "3"):
        with pytest.raises(ValueError, match=f"explain: rounds must be 1 or more, got {rounds!r}"):
            fastops.explain(Net(), x, rounds=rounds)
    with pytest.raises(RuntimeError, match="size"):
        fastops.explain(Net(), torch.randn(4, 7))
    with fastops.enabled(), pytest.raises(RuntimeError, match="explain: PyTorch's ops are fastops' now"):
        fastops.explain(Net(), x)
    with pytest.raises(ValueError, match=r"explain: model must have been called once: 0\.weight has no values before"):
        fastops.explain(nn.Sequential(nn.LazyLinear(3)), torch.randn(4, 7))
    with pytest.raises(ValueError, match=r"explain: model must have values, got 0\.weight on the meta device"):
        fastops.explain(nn.Sequential(nn.Linear(7, 3, device="meta")), torch.randn(4, 7))
    model = Net()
    model.lock = (one for one in ())
    with pytest.raises(TypeError, match=r"explain: model must be one that copy.deepcopy can copy, got an error: "):
        fastops.explain(model, x)


# ---- the page --------------------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_page(explanation, tmp_path):
    """It is well formed, refers to nothing outside itself, and has what the text has."""
    explanation.save_html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert page.open == []
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert {name for name, _ in page.attributes} <= {"class", "style", "lang", "charset"}
    assert not re.search(r"https?:|url\(|@import|//", text)
    for told in (explanation.advice(), "1 x GroupNorm", "no fastops kernel", "torch.nn.Conv2d", "conv"):
        assert told in page.text
    assert page.tags.count("h2") == 6


def test_text_on_the_page_is_escaped(explanation, tmp_path):
    found = copy.copy(explanation)
    found.model = "<script>alert(1)</script>&"
    found.save_html(tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text())
    assert "script" not in page.tags
    assert found.model in page.text


BROWSERS = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome", "firefox-esr")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)


@pytest.mark.skipif(BROWSER is None, reason="no browser: apt-get install chromium-headless-shell")
def test_page_in_a_browser(explanation, tmp_path):
    """It is drawn without a network: its text is in the document, its bars have their lengths."""
    explanation.save_html(tmp_path / "page.html")
    picture = tmp_path / "page.png"
    command = [BROWSER, "--headless", "--window-size=900,1200"]
    if "firefox" in BROWSER:
        command += ["--profile", str(tmp_path), "--screenshot", str(picture)]
    else:
        command += [
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--host-rules=MAP * ~NOTFOUND",
        ]
        command += [f"--screenshot={picture}"]
    subprocess.run([*command, f"file://{tmp_path}/page.html"], check=True, capture_output=True, timeout=120)
    image = torch.from_numpy(imread(picture))[..., :3]
    blue = torch.tensor([0x2F, 0x6F, 0xDE]) / 255
    assert ((image - blue).abs().amax(-1) < 0.02).sum() > 500  # the bars
    assert image.reshape(-1, 3).unique(dim=0).shape[0] > 20  # and text


# ---- fastops doctor --------------------------------------------------------------------------------------------------

PROGRAM = """
import torch
from torch import nn
from helper import WIDTH

def build():
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU()), torch.randn(4, WIDTH)

def by_name():
    return nn.Linear(8, 8), {"input": torch.randn(4, 8)}

class TakesDict(nn.Linear):
    def forward(self, batch):
        return super().forward(batch["x"])

def takes_dict():
    return TakesDict(8, 8), {"x": torch.randn(4, 8)}, {}

def alone():
    return nn.Linear(8, 8)

def wrong():
    return nn.Linear(8, 8), torch.randn(4, 9)

def lazy():
    return nn.LazyLinear(8), torch.randn(4, 9)

def raises():
    raise ValueError("no weights\\nhere")

number = 3
"""


@pytest.fixture
def program(tmp_path):
    (tmp_path / "helper.py").write_text("WIDTH = 8\n")
    path = tmp_path / "model.py"
    path.write_text(PROGRAM)
    return path


def doctor(*arguments):
    return command_line.main(["doctor", *map(str, arguments), "--rounds", "1", "--ways", "replace_", "fuse"])


def test_doctor(program, tmp_path, capsys):
    assert doctor(f"{program}:build", "--html", tmp_path / "page.html") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Sequential, 4x8 float32; ")
    assert "training step: PyTorch" in printed
    assert Page((tmp_path / "page.html").read_text()).text.count("Sequential") >= 1
    assert doctor(f"{program}:by_name", "--no-training", "--html", "/dev/full") == 1
    printed = capsys.readouterr()
    assert "advice" in printed.out
    assert "training step" not in printed.out
    assert printed.err == "fastops doctor: --html: /dev/full cannot be written: No space left on device\n"
    assert doctor(f"{program}:takes_dict", "--no-training") == 0
    assert capsys.readouterr().out.startswith("TakesDict, dict; ")


@pytest.mark.parametrize(
    ("target", "status", "message"),
    [
        ("model.py", 2, "the model must be given as FILE.py:FUNCTION, such as model.py:build, got '.*model.py'"),
        ("missing.py:build", 2, "there is no file '.*missing.py'"),
        ("notes.txt:build", 2, "'.*notes.txt' is not a Python file"),
        ("model.py:bild", 2, ".*model.py has no function bild"),
        ("model.py:number", 2, ".*model.py has no function number"),
        ("model.py:raises", 2, ".*model.py:raises raised ValueError: no weights$"),
        ("model.py:alone", 2, r".*must return \(model, inputs...\), a torch.nn.Module first, got Linear"),
        ("model.py:wrong", 1, "the model raised RuntimeError: .*"),
        ("model.py:lazy", 1, "model must have been called once: weight has no values before that"),
    ],
)
def test_doctor_says_what_to_mend(target, status, message, program, capsys):
    (program.parent / "notes.txt").write_text("")
    assert doctor(program.parent / target) == status
    assert re.match(f"fastops doctor: {message}", capsys.readouterr().err)


def test_doctor_checks_its_options_first(program, capsys):
    assert doctor(f"{program}:build", "--html", "/no/such/folder/page.html") == 2
    assert "--html: there is no folder /no/such/folder" in capsys.readouterr().err
    assert doctor(f"{program}:build", "--html", program.parent) == 2
    assert f"--html: {program.parent} is a folder" in capsys.readouterr().err
    assert command_line.main(["doctor", f"{program}:build", "--rounds", "0"]) == 2
    assert "--rounds must be 1 or more, got 0" in capsys.readouterr().err
