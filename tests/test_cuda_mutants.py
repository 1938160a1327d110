"""What the emulator is worth: every mutant of a CUDA kernel that is listed here has to fail.

A mutant is one piece of the sources that reads otherwise. All of them are written into one copy of the sources, each
behind a switch, and the programs of tests/emulator/checks are compiled with that. They run a few kernels on small
integers in every schedule: with no mutant chosen they succeed, with one they have to fail.
"""

import os
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from gpu import EMULATED, ROOT

import build_native

pytestmark = pytest.mark.skipif(not EMULATED, reason="the emulator is not built")


class Mutant(NamedTuple):
    what: str
    check: str  # the program that has to fail
    file: str
    old: str  # a whole expression, or whole statements that declare nothing
    new: str
    front: str = ""  # text in front of `old` and behind it, where `old` alone is not the only one
    back: str = ""


GEMM, ACTIVATION, FORMULAS, POOL = "gemm.cuh", "activation.cuh", "formulas.cuh", "pool.cuh"
UNITS, ROWS, LAYER, SOFTMAX, LOSS = "units.cuh", "rows.cuh", "layer_norm.cuh", "softmax.cuh", "loss.cuh"
OPTIM, ATTENTION = "optim.cuh", "attention.cuh"
CONV, DEPTHWISE, MLP, NORM = "conv.cuh", "depthwise.cuh", "mlp.cuh", "batch_norm.cuh"
MUTANTS = [
    # ---- barriers
    Mutant("no barrier before a tile is read", "gemm", GEMM, "__syncthreads();", "", back="  // this tile"),
    Mutant("no barrier before the stages are reused", "gemm", GEMM, "__syncthreads();", "",
           back="  // the stages are"),
    Mutant("no barrier before C is read", "gemm", GEMM, "__syncthreads();", "",
           front="multiplier.store(tile, St::kRow);\n  "),
    Mutant("no barrier in a block's sum", "activation", FORMULAS, "__syncthreads();", ""),
    Mutant("a barrier that half of the block skips", "activation", FORMULAS, "__syncthreads();",
           "if (threadIdx.x < 128) __syncthreads();"),
    # ---- waits for asynchronous copies
    Mutant("waits for one tile too few", "gemm", GEMM, "cp_async_wait<St::kStages - 2>();",
           "cp_async_wait<St::kStages - 1>();"),
    Mutant("a group is not committed", "gemm", GEMM, "cp_async_commit();", "",
           front="b.place(next_stage + A::kSize);\n    }\n    "),
    Mutant("copies into the stage that is being read", "gemm", GEMM, "tile + St::kStages - 1", "tile + St::kStages",
           front="const int next = "),
    Mutant("one stage too few", "gemm", GEMM, "tile % St::kStages * St::kStage",
           "tile % (St::kStages - 1) * St::kStage"),
    Mutant("what went through registers is not placed", "gemm", GEMM, "a.place(next_stage);", ""),
    # ---- bounds
    Mutant("rows of an operand that do not exist", "gemm", GEMM, "row + u * row_step >= rows || left <= 0",
           "left <= 0"),
    Mutant("elements behind the end of a row", "gemm", GEMM, "left < kWidth ? left : kWidth", "kWidth"),
    Mutant("rows and columns of C that do not exist", "gemm", GEMM,
           "if (m0 + row >= task.m || n0 + col >= task.n) continue;", ""),
    Mutant("sums of rows that do not exist", "gemm", GEMM, "own_row < task.m", "true",
           front="Multiplier::kTileM && "),
    Mutant("reads behind the last unit", "activation", FORMULAS, "to[i] = i < count ? from[i] : S{};",
           "to[i] = from[i];"),
    Mutant("writes behind the last unit", "activation", FORMULAS, "if (i < count) to[i] = from[i];",
           "to[i] = from[i];"),
    Mutant("units that do not exist", "activation", UNITS, "unit < units.units", "true", front="if (", back=") {"),
    Mutant("bits of a mask behind the last element", "activation", ACTIVATION, "i < at.count", "true",
           back=" && Kind::inside"),
    # ---- fragments and indices
    Mutant("two registers of B's fragments", "gemm", GEMM, "fb[j][1] = r[1];\n        fb[j + 1][0] = r[2];",
           "fb[j][1] = r[2];\n        fb[j + 1][0] = r[1];"),
    Mutant("two matrices of A's fragment", "gemm", GEMM, "A::offset(m + first + row, k + second)",
           "A::offset(m + second + row, k + first)"),
    Mutant("the same, transposed", "gemm", GEMM, "A::offset(m + first, k + second + row)",
           "A::offset(m + second, k + first + row)"),
    Mutant("two matrices of B's fragments", "gemm", GEMM, "B::offset(n + second + row, k + first)",
           "B::offset(n + first + row, k + second)"),
    Mutant("ldmatrix without its transpose", "gemm",
           GEMM, "ldmatrix_x4_trans(r, b + B::offset(n + second, k + first + row));",
           "ldmatrix_x4(r, b + B::offset(n + second, k + first + row));"),
    Mutant("two registers of tf32's A", "gemm", GEMM, "A::offset(m0 + i * 16 + e % 2 * 8, k + e / 2 * 4)",
           "A::offset(m0 + i * 16 + e / 2 * 8, k + e % 2 * 4)"),
    Mutant("two rows of C's fragment", "gemm", GEMM, "(i * 16 + e / 2 * 8) * row + j * 8 + e % 2",
           "(i * 16 + e % 2 * 8) * row + j * 8 + e / 2"),
    Mutant("a lane's column of C", "gemm", GEMM, "static_cast<int>(threadIdx.x) % 8 * 4",
           "static_cast<int>(threadIdx.x) / 8 % 8 * 4"),
    Mutant("a lane missing from a warp's sum", "activation", FORMULAS, "16", "8", front="int distance = "),
    Mutant("a part of k missing from the sum", "gemm", GEMM,
           "0", "1", front="for (int64_t split = ",
           back="; split < task.splits; ++split) {"),
    Mutant("the derivative of the wrong element", "gemm", GEMM, "V::load(held_saved[u] + i)", "V::load(held_saved[u])"),
    # ---- windows
    Mutant("taps in front of the input", "pool", POOL, "first < 0 ? (-first + step - 1) / step : 0", "I{0}"),
    Mutant("taps behind the input", "pool", POOL, "room <= 0 ? 0 : (room + step - 1) / step", "g.kernel[i]"),
    Mutant("the first window of an element is missed", "pool", POOL, "(reach + g.stride[i] - 1) / g.stride[i]",
           "(reach + g.stride[i]) / g.stride[i] + 1"),
    Mutant("the last window of an element is missed", "pool", POOL, "1", "0", front="last : g.out[i] - 1) + "),
    Mutant("elements that do not exist", "pool", POOL, "if (index >= count) return;", ""),
    Mutant("the divisor counts the padding", "pool", POOL, "!include_pad", "false", front="g.adaptive || "),
    # ---- fused networks
    *(
        Mutant(f"no barrier where {what}", "mlp", MLP, "__syncthreads();", "", back=f"  // {what}")
        for what in (
            "nobody reads the tile before this one any more",
            "this tile is there for all, and nobody reads the one before",
            "the layer's weights are there for all",
            "all have read the layer's input",
            "the layer's output is there for all",
            "nobody reads the tile before any more",
            "all have read g",
            "the tile of the layer before is there for all",
        )
    ),
    Mutant("a tile that nobody waits for", "mlp", MLP, "cp_async_wait<0>();", "",
           back="\n    __syncthreads();  // this tile"),
    Mutant("the next tile comes into this one, forward", "mlp", MLP, "stages + kMlpForwardTile<Kind>", "stages",
           back=" : stages"),
    Mutant("the next tile comes into this one, backward", "mlp", MLP, "stages + 2 * kMlpBackwardTile<Kind>", "stages",
           back=" : stages"),
    Mutant("rows of a tile that do not exist", "mlp", MLP, "row >= rows || left <= 0", "left <= 0", back=" ? 0"),
    Mutant("columns of a vector that do not exist", "mlp", MLP, "left < kVector<S> ? left : kVector<S>",
           "kVector<S>", back=";"),
    Mutant("elements of a tile that do not exist", "mlp", MLP, "row < rows && col < cols", "row < rows",
           back=" ? from"),
    Mutant("rows that do not exist are stored", "mlp", MLP, "if (row >= rows || left <= 0) continue;", ""),
    Mutant("weights that are not transposed", "mlp", MLP, "tile + col * kPitch + row", "tile + row * kPitch + col",
           back=","),
    Mutant("a step of k that is not whole is left out", "mlp", MLP, "k < depth",
           "k + Multiplier::kTileK <= depth", back="; k += Multiplier::kTileK"),
    Mutant("another layer's bias", "mlp", MLP, "first + biases[l * width + col]", "first + biases[col]"),
    Mutant("pre-activations over outputs", "mlp", MLP, "(layers - 1 + l) * shape.m * task.hidden_stride",
           "l * shape.m * task.hidden_stride"),
    Mutant("the derivative of another row", "mlp", MLP, "y_tile + row * pitch + col", "y_tile + col"),
    Mutant("a row missing from a bias's gradient", "mlp", MLP, "row < tile_rows", "row < tile_rows - 1",
           back="; ++row) bias_gradient"),
    Mutant("a block missing from the sum", "mlp", MLP, "0", "1", front="for (int64_t block = ",
           back="; block < blocks"),
    Mutant("rows of a fragment's pairs", "mlp", GEMM, "row + i * 16 + e * 8", "row + i * 16", front="body("),
    Mutant("a thread's rows of A", "mlp", GEMM, "from_a[A::offset(i * 16 + r, k)]", "from_a[A::offset(i * 16, k)]"),
    Mutant("columns of a thread's pairs", "mlp", GEMM, "j % 2 * 2", "0", front="j / 2 * 32 + ", back=", pair[0]"),
    # ---- batch norms
    Mutant("no barrier before the sums of warps are read", "batch_norm", NORM, "__syncthreads();", "",
           back="\n    Channel<C>* const finished"),
    *(
        Mutant(f"no barrier where {what}", "batch_norm", NORM, "__syncthreads();", "", back=f"  // {what}")
        for what in ("the channel is finished", "the sums of all warps are there", "nobody reads them any more")
    ),
    Mutant("parts with the same mean", "batch_norm", NORM, "difference * difference * (a.count * share)", "0"),
    Mutant("a part missing from a channel", "batch_norm", NORM, "threadIdx.x % 32", "threadIdx.x % 32 + 1",
           front="int64_t part = ", back="; part <"),
    Mutant("a warp missing from a channel", "batch_norm", NORM, "1", "2", front="for (int warp = ",
           back="; warp < kThreads / 32; ++warp) sums = joined(sums, warps[warp],"),
    Mutant("elements behind the end of a plane", "batch_norm", NORM, "((1u << place.count) - 1)", "((1u << n) - 1)"),
    Mutant("rows that do not exist", "batch_norm", NORM, "if (row >= end) continue;", ""),
    Mutant("channels that do not exist", "batch_norm", NORM, "left < n ? static_cast<int>(left) : n", "n"),
    Mutant("lanes of other channels in a sum", "batch_norm", NORM, "distance >= lanes", "distance > 0"),
    Mutant("the shift is left out", "batch_norm", NORM, "static_cast<double>(r.shift) + r.first / r.count",
           "r.first / r.count"),
    Mutant("chunks with the same mean", "batch_norm", NORM, "(r.second - r.first * r.first / r.count)", "0"),
    # ---- rows: layer norms, softmax, losses
    *(
        Mutant(f"no barrier where {what}", "rows", file, "__syncthreads();", "", back=f"  // {what}")
        for file, what in (
            (ROWS, "every warp's sum is there"),
            (ROWS, "every thread has read the sums"),
            (ROWS, "every warp's maximum is there"),
            (ROWS, "every thread has read the maxima"),
            (ROWS, "every warp's values are there"),
            (ROWS, "every thread has read the values"),
            (LAYER, "the tile is there"),
            (LAYER, "the sums of all warps are there"),
            (LAYER, "nobody reads them any more"),
            (LOSS, "the losses of the rows are there"),
        )
    ),
    Mutant("a chunk that is not held is not read", "rows", ROWS, "chunk != held", "held < 0"),
    Mutant("elements of a chunk that do not exist", "rows", ROWS, "size - col < n ? static_cast<int>(size - col) : n",
           "n"),
    Mutant("deviations of what does not exist", "rows", LAYER, "i < count ? to_compute(x[u][i]) - mean : C(0)",
           "to_compute(x[u][i]) - mean"),
    Mutant("rows of the parameters' gradients that do not exist", "rows", LAYER, "row >= end", "false",
           front="if (", back=") continue;"),
    Mutant("lanes of other columns in a sum", "rows", LAYER, "distance >= lanes", "distance > 0"),
    Mutant("a part of the rows is missing", "rows", LAYER, "part < task.parts", "part < task.parts - 1"),
    Mutant("a warp's parts are missing", "rows", LAYER, "1", "2", front="for (int warp = ",
           back="; warp < kThreads / 32; ++warp) sum += shared[warp * 32 +"),
    Mutant("a tile that is not transposed", "rows", LAYER, "lane * (kTransposed + 1) + i",
           "i * (kTransposed + 1) + lane"),
    Mutant("a sum of what does not exist", "rows", SOFTMAX, "i < count", "true", front="if (", back=") sum +="),
    Mutant("neighbours that do not exist", "rows", SOFTMAX, "i < task.inner", "true", back=" ? outer"),
    Mutant("positions that do not exist", "rows", LOSS, "row < task.positions", "true", front="if ("),
    Mutant("a block's losses are missing", "rows", LOSS, "i < blocks", "i < blocks - 1"),
    Mutant("a class that does not exist", "rows", LOSS, "i < task.inner ? task.classes : 0", "task.classes"),
    Mutant("the target's own term is missing", "rows", LOSS, "spread += at_target;", ""),
    # ---- optimizers
    Mutant("another tensor's block", "optim", OPTIM, "task.first_block[middle] <= static_cast<int>(blockIdx.x)",
           "task.first_block[middle] < static_cast<int>(blockIdx.x)"),
    Mutant("a tensor begins where the one before did", "optim", OPTIM, "task.first_block[low]",
           "task.first_block[0]", front="blockIdx.x) - "),
    Mutant("elements that do not exist", "optim", OPTIM, "n - first < size ? static_cast<int>(n - first) : size",
           "size"),
    # ---- attention
    *(
        Mutant(f"no barrier where {what}", "attention", ATTENTION, "__syncthreads();", "", back=f"  // {what}")
        for what in (
            "both chunks are there",
            "nobody reads the chunks any more",
            "the scores and the rows are there",
            "nobody reads them any more",
        )
    ),
    Mutant("rows of a tile that do not exist", "attention", ATTENTION, "row < rows.count", "true"),
    Mutant("keys that do not exist", "attention", ATTENTION, "key >= task.of.keys", "false"),
    Mutant("what was summed before a larger score", "attention", ATTENTION, "sums[r][j] *= again;", ""),
    Mutant("a row's total of some of its threads", "attention", ATTENTION, "8", "4", front="int distance = "),
    Mutant("keys after the last tile of a causal query", "attention", ATTENTION, "task.of.causal && key > query",
           "false"),
    Mutant("every slice is the first", "attention", ATTENTION, "blockIdx.x % task.slices * kSlice", "0"),
    Mutant("columns of a slice", "attention", ATTENTION, "j / kVector<C> * 16 * kVector<C>", "0"),
    Mutant("a query's delta", "attention", ATTENTION, "(d[r][c] - delta[r])", "d[r][c]"),
    # ---- convolutions
    Mutant("no barrier after a phase is opened", "conv", CONV, "__syncthreads();", "", front="(axis.taps);\n  }\n  "),
    Mutant("no barrier before the places of C are read", "conv", CONV, "__syncthreads();", "", front="}\n  ",
           back="\n  constexpr int pairs"),
    Mutant("windows reach over the edge", "conv", CONV, "static_cast<unsigned>(window.axis[i].size)", "0x7fffffffu"),
    Mutant("positions that do not exist", "conv", CONV, "!exists", "false", front="if (", back=") place.at[0]"),
    Mutant("channels that do not exist, channels last", "conv", CONV, "i < channels", "true", front="body(u, i, "),
    Mutant("channels that do not exist, channels first", "conv", CONV, "u * channel_step() + i < channels", "true"),
    Mutant("vectors of channels that do not exist", "conv", CONV, "first_channel() < (kKIsPosition ? mn_left : depth)",
           "true"),
    Mutant("the next channel is not the next tap's first", "conv", CONV,
           "t.channel == operand.channels.count()", "false", front="if (", back=") {"),
    Mutant("the positions of a thread are all the same", "conv", CONV,
           "if (distance > 0) advance(p, window, distance);", ""),
    Mutant("a phase begins with the first tap", "conv", CONV, "axis.tap_first", "0", front="int at = "),
    Mutant("the taps of a phase are neighbours", "conv", CONV, "next(tap + 1) - tap", "1", front="jump = "),
    Mutant("images do not follow each other", "conv", CONV, "p.image += distance;", ""),
    Mutant("every group is the first", "conv", CONV, "operand.data + group * operand.group_stride", "operand.data",
           front="group("),
    Mutant("the derivative of another element", "conv", CONV, "operand.saved[from - operand.data]",
           "operand.saved[0]"),
    Mutant("a division that is none", "conv", CONV, "(high + static_cast<uint32_t>(n)) >> shift", "high >> shift"),
    Mutant("a second column that does not exist", "conv", CONV, "cols[col + 1] < 0", "false", back=" ? -1 : rows"),
    Mutant("columns that are no neighbours in memory", "conv", CONV, "second_at == at + 1", "second_at >= 0",
           front="neighbours = "),
    Mutant("C where there is none", "conv", CONV, "if (m >= extents.m || n >= extents.n) continue;", ""),
    Mutant("parts of C where there is none", "conv", CONV, "if (m >= extents.m || n >= extents.n) return;", ""),
    Mutant("a part missing from the sum of a row", "conv", CONV, "0", "task.splits - 1", front="for (int64_t split = ",
           back="; split < task.splits; ++split) sum += sums"),
    Mutant("the bias of the wrong channel", "conv", CONV, "group * task.n + n + 1", "group * task.n + n",
           back=", value"),
    Mutant("filters that do not exist", "conv", CONV, "if (index >= task.count) return;", ""),
    Mutant("depthwise windows reach over the edge", "conv_depthwise", DEPTHWISE, "if (!inside) continue;", ""),
    Mutant("the same for the weight's gradient", "conv_depthwise", DEPTHWISE, "inside", "true", front="if (",
           back=") sum[t]"),
    Mutant("depthwise channels that do not exist", "conv_depthwise", DEPTHWISE, "channel < task.channels", "true",
           back=" && position < end"),
    Mutant("no barrier while a block sums", "conv_depthwise", DEPTHWISE, "__syncthreads();", "",
           back="\n      if (worker"),
    Mutant("no barrier before the next sum", "conv_depthwise", DEPTHWISE, "__syncthreads();", "",
           back="  // the sums are read"),
    Mutant("elements that depthwise kernels do not have", "conv_depthwise", DEPTHWISE,
           "if (index >= task.count) return;", ""),
    Mutant("sums of a split that do not exist", "conv_depthwise", DEPTHWISE, "if (index >= count) return;", ""),
]  # fmt: skip


def switches(mutants: list[tuple[int, Mutant]], text: str) -> str:
    """The text with each of these mutants of it behind its switch, which its number turns on."""
    edits = []
    for number, mutant in mutants:
        place = mutant.front + mutant.old + mutant.back
        assert place in text, f"{mutant.file} has changed, and so must the mutant: {mutant.what}"
        at = text.find(place)
        while at >= 0:
            start = at + len(mutant.front)
            end = start + len(mutant.old)
            if mutant.old.endswith(";"):
                opening, closing = f"{{ if (mutant == {number}) {{ {mutant.new} }} else {{ ", " } }"
            else:
                opening, closing = f"(mutant == {number} ? ({mutant.new}) : (", "))"
            # One inside another: at one place the inner one closes before the outer one, and opens behind it.
            edits += [(start, 1, -end, opening), (end, 0, -start, closing)]
            at = text.find(place, at + 1)
    parts, done = [], 0
    for at, _, _, inserted in sorted(edits):
        parts += [text[done:at], inserted]
        done = at
    return "".join([*parts, text[done:]])


@pytest.fixture(scope="module")
def programs() -> dict[str, Path]:
    """The checks, compiled with every mutant. What is there from an earlier run is kept where nothing has changed."""
    folder = ROOT / "build" / "mutants"
    with build_native.locked(folder):
        kernels = ROOT / "csrc" / "kernels"
        for source in filter(Path.is_file, kernels.rglob("*")):
            mutants = [(i, m) for i, m in enumerate(MUTANTS, 1) if source.name == m.file]
            text = switches(mutants, source.read_text())
            copy = folder / "kernels" / source.relative_to(kernels)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if not copy.exists() or copy.read_text() != text:
                copy.write_text(text)
        return {path.name: path for path in build_native.build_emulator_checks(folder, folder / "kernels")}


def run(program: Path, number: int = 0) -> subprocess.CompletedProcess:
    environment = {**os.environ, "FASTOPS_MUTANT": str(number)}
    return subprocess.run([program], env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "check", ["gemm", "activation", "pool", "conv", "conv_depthwise", "mlp", "batch_norm", "rows", "optim", "attention"]
)
def test_without_a_mutant_the_checks_succeed(programs, check):
    result = run(programs[check])
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("number", range(1, len(MUTANTS) + 1), ids=lambda number: MUTANTS[number - 1].what)
def test_mutant_fails(programs, number):
    assert run(programs[MUTANTS[number - 1].check], number).returncode != 0
