"""`fastops bench --busy`: models on a machine that has other things to do.

Each library has a process of its own, and they take turns. While one is measured, endless loops of other processes run
beside it, at the same priority or at nice 19; a turn begins when it has had them for a second. A time is the mean over
all calls of a turn, as the slow ones are what counts here; of several turns, the median.
"""

import io
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastops
import fastops.functional as FF
from fastops.benchmarks import report
from fastops.benchmarks.models import resnet18

SETTLE_SECONDS = 1.0
LIBRARIES = ("PyTorch", "fastops")


@dataclass(frozen=True)
class Load:
    """What runs beside: so many endless loops for each processor, and at this niceness."""

    name: str
    loops: Callable[[int], int]
    nice: int = 0


LOADS = (
    Load("idle", lambda cores: 0),
    Load("one core busy", lambda cores: 1),
    Load("one core busy, nice 19", lambda cores: 1, 19),
    Load("all cores busy", lambda cores: cores),
    Load("all cores busy, nice 19", lambda cores: cores, 19),
    Load("two loops a core", lambda cores: 2 * cores),
)


# ---- what is measured ------------------------------------------------------------------------------------------------


def _resnet(ours: bool) -> Callable[[], object]:
    model = resnet18((3, 224, 224)).eval()
    x = torch.randn(2, 3, 224, 224)
    if ours:
        fastops.replace_(model)
    return lambda: model(x)


def _mlp_step(ours: bool) -> Callable[[], object]:
    model = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    if ours:
        fastops.replace_(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    x, target = torch.randn(64, 784), torch.randint(10, (64,))

    def step() -> None:
        with torch.enable_grad():
            optimizer.zero_grad()
            F.cross_entropy(model(x), target).backward()
            optimizer.step()

    return step


class _Jpegs(torch.utils.data.Dataset):
    """Noisy JPEG files of 256 x 256, in memory, decoded and halved when they are asked for."""

    def __init__(self) -> None:
        from PIL import Image

        self.files = []
        for seed in range(16):
            coarse = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
            pixels = (255 * F.interpolate(coarse, (256, 256), mode="bilinear")[0]).byte().permute(1, 2, 0)
            file = io.BytesIO()
            Image.fromarray(pixels.numpy()).save(file, "JPEG", quality=90)
            self.files.append(file.getvalue())

    def __len__(self) -> int:
        return 1 << 20

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        image = Image.open(io.BytesIO(self.files[index % 16])).resize((128, 128))
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(128, 128, 3)
        return pixels.permute(2, 0, 1).float() / 255, index % 10


def _loader_step(ours: bool) -> Callable[[], object]:
    """A step waits for images only where the two processes that decode them are late: they want the cores, too."""
    model = resnet18((3, 128, 128))
    fused = fastops.fuse(model) if ours else model
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    batches = iter(torch.utils.data.DataLoader(_Jpegs(), 16, num_workers=2))

    def step() -> None:
        x, target = next(batches)
        with torch.enable_grad():
            optimizer.zero_grad()
            F.cross_entropy(fused(x), target).backward()
            optimizer.step()

    return step


def _mixed(ours: bool) -> Callable[[], object]:
    conv, linear = (FF.conv2d, FF.linear) if ours else (F.conv2d, F.linear)
    x, filters, bias = torch.randn(4, 32, 28, 28), 0.1 * torch.randn(32, 32, 3, 3), torch.randn(32)
    w, b = 0.1 * torch.randn(256, 784), torch.randn(256)

    def call() -> Tensor:
        y = torch.add(conv(x, filters, bias, padding=1), x)
        return torch.softmax(linear(y.view(128, 784), w, b), 1)

    return call


WORK = {
    "ResNet-18, batch 2, inference": _resnet,
    "MLP 784-512-512-10, batch 64, training step": _mlp_step,
    "ResNet-18, 16 images of 128 x 128, training step, two processes that decode JPEGs": _loader_step,
    "conv, aten::add, linear, aten::softmax": _mixed,
}


# ---- a process for each library --------------------------------------------------------------------------------------


def _times(call: Callable[[], object], seconds: float) -> list[float]:
    """Of calls, one after the other, for so long."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return times


def _serve(library: str, name: str, threads: int) -> None:
    """For each line, a number of seconds, prints the mean time of a call in milliseconds."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    with torch.no_grad():
        call = WORK[name](library == "fastops")
        for _ in range(5):
            call()
        print("ready", flush=True)
        for line in sys.stdin:
            _times(call, SETTLE_SECONDS)
            print(1e3 * mean(_times(call, float(line))), flush=True)


class _Worker:
    def __init__(self, library: str, name: str, threads: int) -> None:
        command = [sys.executable, "-m", "fastops.benchmarks.busy", library, name, str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()

    def measure(self, seconds: float) -> float:
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        return float(self._read())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def _read(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"fastops bench --busy: a process ended with status {self.process.wait()}")
        return line


@contextmanager
def beside(load: Load, cores: int) -> Iterator[None]:
    """Runs the loops of this load."""
    loops = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"], preexec_fn=lambda: os.nice(load.nice))
        for _ in range(load.loops(cores))
    ]
    try:
        time.sleep(0.2 if loops else 0)  # until they have started
        yield
    finally:
        for loop in loops:
            loop.kill()
        for loop in loops:
            loop.wait()


# ---- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """The milliseconds of each turn, by library."""

    work: str
    load: str
    milliseconds: dict[str, list[float]]


def measure(threads: int, turns: int, seconds: float, progress: Callable[[str], None] = print) -> list[Row]:
    """All of WORK under all of LOADS; progress is told each row."""
    cores = len(os.sched_getaffinity(0))
    rows = []
    for name in WORK:
        workers = {library: _Worker(library, name, threads) for library in LIBRARIES}
        try:
            times = {load.name: {library: [] for library in LIBRARIES} for load in LOADS}
            for _ in range(turns):
                for load in LOADS:
                    with beside(load, cores):
                        for library, worker in workers.items():
                            times[load.name][library].append(worker.measure(seconds))
        finally:
            for worker in workers.values():
                worker.close()
        of_work = [Row(name, load.name, times[load.name]) for load in LOADS]
        progress(table(of_work))
        rows += of_work
    return rows


def table(rows: list[Row]) -> str:
    """Milliseconds, how many times those of the idle machine they are, and PyTorch's by fastops'."""
    idle = {row.work: row.milliseconds for row in rows if row.load == "idle"}
    lines = [
        f"{rows[0].work}\n{'':26}{'PyTorch':>10}{'x idle':>8}{'fastops':>10}{'x idle':>8}{'PyTorch / fastops':>19}"
    ]
    for row in rows:
        theirs, ours = (median(row.milliseconds[library]) for library in LIBRARIES)
        base = [median(idle[row.work][library]) for library in LIBRARIES]
        lines.append(
            f"{row.load:26}{theirs:10.2f}{theirs / base[0]:8.2f}{ours:10.2f}{ours / base[1]:8.2f}{theirs / ours:19.2f}"
        )
    return "\n".join(lines) + "\n"


def run(out: Path, threads: int, quick: bool) -> int:
    """Measures, prints, and writes one JSON into this folder."""
    stamp = report.machine()
    print("\n".join(f"{key:<17} {value}" for key, value in stamp.items()), end="\n\n")
    rows = measure(threads, 1 if quick else 3, 0.5 if quick else 1.0)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"busy-{report.file_name(stamp)}.json"
    path.write_text(
        json.dumps({"machine": stamp, "kernel": platform.release(), "rows": list(map(asdict, rows))}, indent=1)
    )
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], int(sys.argv[3]))
