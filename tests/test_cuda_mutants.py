"""What the emulator is worth: every mutant of a CUDA kernel that is listed here has to fail.

A mutant is a copy of the sources with one piece of text changed. The programs of tests/emulator/checks run a few
kernels on small integers in every schedule; on the sources as they are they succeed.
"""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
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
    old: str
    new: str


GEMM, ACTIVATION, FORMULAS, POOL = "gemm.cuh", "activation.cuh", "formulas.cuh", "pool.cuh"
CONV, DEPTHWISE, MLP = "conv.cuh", "conv_depthwise.cuh", "mlp.cuh"
MUTANTS = [
    # ---- barriers
    Mutant("no barrier before a tile is read", "gemm", GEMM, "__syncthreads();  // this tile", "// this tile"),
    Mutant("no barrier before the stages are reused", "gemm", GEMM, "__syncthreads();  // the stages are", "//"),
    Mutant("no barrier before C is read", "gemm", GEMM, "multiplier.store(tile, St::kRow);\n  __syncthreads();",
           "multiplier.store(tile, St::kRow);"),
    Mutant("no barrier in a block's sum", "activation", FORMULAS, "__syncthreads();", ""),
    Mutant("a barrier that half of the block skips", "activation", FORMULAS, "__syncthreads();",
           "if (threadIdx.x < 128) __syncthreads();"),
    # ---- waits for asynchronous copies
    Mutant("waits for one tile too few", "gemm", GEMM, "cp_async_wait<St::kStages - 2>",
           "cp_async_wait<St::kStages - 1>"),
    Mutant("a group is not committed", "gemm", GEMM,
           "b.place(next_stage + A::kSize);\n    }\n    cp_async_commit();", "b.place(next_stage + A::kSize);\n    }"),
    Mutant("copies into the stage that is being read", "gemm", GEMM, "const int next = tile + St::kStages - 1;",
           "const int next = tile + St::kStages;"),
    Mutant("one stage too few", "gemm", GEMM, "tile % St::kStages * St::kStage",
           "tile % (St::kStages - 1) * St::kStage"),
    Mutant("what went through registers is not placed", "gemm", GEMM, "a.place(next_stage);", ""),
    # ---- bounds
    Mutant("rows of an operand that do not exist", "gemm", GEMM, "row + u * row_step >= rows || left <= 0",
           "left <= 0"),
    Mutant("elements behind the end of a row", "gemm", GEMM, "left < kWidth ? left : kWidth", "kWidth"),
    Mutant("rows and columns of C that do not exist", "gemm", GEMM,
           "if (m0 + row >= task.m || n0 + col >= task.n) continue;", ""),
    Mutant("sums of rows that do not exist", "gemm", GEMM, "Multiplier::kTileM && own_row < task.m)",
           "Multiplier::kTileM)"),
    Mutant("reads behind the last unit", "activation", FORMULAS, "to[i] = i < count ? from[i] : S{};",
           "to[i] = from[i];"),
    Mutant("writes behind the last unit", "activation", FORMULAS, "if (i < count) to[i] = from[i];",
           "to[i] = from[i];"),
    Mutant("units that do not exist", "activation", ACTIVATION, "if (unit < units.units) {", "{"),
    Mutant("bits of a mask behind the last element", "activation", ACTIVATION, "if (i < at.count && Kind::inside",
           "if (Kind::inside"),
    # ---- fragments and indices
    Mutant("two registers of B's fragments", "gemm", GEMM, "fb[j][1] = r[1];\n        fb[j + 1][0] = r[2];",
           "fb[j][1] = r[2];\n        fb[j + 1][0] = r[1];"),
    Mutant("two matrices of A's fragment", "gemm", GEMM, "A::offset(m + first + row, k + second)",
           "A::offset(m + second + row, k + first)"),
    Mutant("the same, transposed", "gemm", GEMM, "A::offset(m + first, k + second + row)",
           "A::offset(m + second, k + first + row)"),
    Mutant("two matrices of B's fragments", "gemm", GEMM, "B::offset(n + second + row, k + first)",
           "B::offset(n + first + row, k + second)"),
    Mutant("ldmatrix without its transpose", "gemm", GEMM, "ldmatrix_x4_trans(r, b + ", "ldmatrix_x4(r, b + "),
    Mutant("two registers of tf32's A", "gemm", GEMM, "i * 16 + e % 2 * 8, k + e / 2 * 4",
           "i * 16 + e / 2 * 8, k + e % 2 * 4"),
    Mutant("two rows of C's fragment", "gemm", GEMM, "(i * 16 + e / 2 * 8) * row + j * 8 + e % 2",
           "(i * 16 + e % 2 * 8) * row + j * 8 + e / 2"),
    Mutant("a lane's column of C", "gemm", GEMM, "static_cast<int>(threadIdx.x) % 8 * 4",
           "static_cast<int>(threadIdx.x) / 8 % 8 * 4"),
    Mutant("a lane missing from a warp's sum", "activation", FORMULAS, "int distance = 16;", "int distance = 8;"),
    Mutant("a part of k missing from the sum", "gemm", GEMM,
           "for (int64_t split = 0; split < task.splits; ++split) {",
           "for (int64_t split = 1; split < task.splits; ++split) {"),
    Mutant("the derivative of the wrong element", "gemm", GEMM, "V::load(held_saved[u] + i)", "V::load(held_saved[u])"),
    # ---- windows
    Mutant("taps in front of the input", "pool", POOL, "first < 0 ? (-first + step - 1) / step : 0", "0"),
    Mutant("taps behind the input", "pool", POOL, "room <= 0 ? 0 : (room + step - 1) / step", "g.kernel[i]"),
    Mutant("the first window of an element is missed", "pool", POOL, "(reach + g.stride[i] - 1) / g.stride[i]",
           "(reach + g.stride[i]) / g.stride[i] + 1"),
    Mutant("the last window of an element is missed", "pool", POOL, "last : g.out[i] - 1) + 1", "last : g.out[i] - 1)"),
    Mutant("elements that do not exist", "pool", POOL, "if (index >= count) return;", ""),
    Mutant("the divisor counts the padding", "pool", POOL, "if (g.adaptive || !include_pad)", "if (g.adaptive)"),
    # ---- fused networks
    *(
        Mutant(f"no barrier where {what}", "mlp", MLP, f"__syncthreads();  // {what}", f"// {what}")
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
    Mutant("a tile that nobody waits for", "mlp", MLP,
           "cp_async_wait<0>();\n    __syncthreads();  // this tile", "__syncthreads();  // this tile"),
    Mutant("the next tile comes into this one, forward", "mlp", MLP, "stages + kMlpForwardTile<Kind> : stages",
           "stages : stages"),
    Mutant("the next tile comes into this one, backward", "mlp", MLP, "stages + 2 * kMlpBackwardTile<Kind> : stages",
           "stages : stages"),
    Mutant("rows of a tile that do not exist", "mlp", MLP, "row >= rows || left <= 0 ? 0", "left <= 0 ? 0"),
    Mutant("columns of a vector that do not exist", "mlp", MLP, "left < kVector<S> ? left : kVector<S>;",
           "kVector<S>;"),
    Mutant("elements of a tile that do not exist", "mlp", MLP, "row < rows && col < cols ? from", "row < rows ? from"),
    Mutant("rows that do not exist are stored", "mlp", MLP, "if (row >= rows || left <= 0) continue;", ""),
    Mutant("weights that are not transposed", "mlp", MLP, "tile + col * kPitch + row,", "tile + row * kPitch + col,"),
    Mutant("a step of k that is not whole is left out", "mlp", MLP, "k < depth; k += Multiplier::kTileK",
           "k + Multiplier::kTileK <= depth; k += Multiplier::kTileK"),
    Mutant("another layer's bias", "mlp", MLP, "first + biases[l * width + col]", "first + biases[col]"),
    Mutant("pre-activations over outputs", "mlp", MLP, "(layers - 1 + l) * shape.m * task.hidden_stride",
           "l * shape.m * task.hidden_stride"),
    Mutant("the derivative of another row", "mlp", MLP, "y_tile + row * pitch + col", "y_tile + col"),
    Mutant("a row missing from a bias's gradient", "mlp", MLP, "row < tile_rows; ++row) bias_gradient",
           "row < tile_rows - 1; ++row) bias_gradient"),
    Mutant("a block missing from the sum", "mlp", MLP, "for (int64_t block = 0; block < blocks",
           "for (int64_t block = 1; block < blocks"),
    Mutant("rows of a fragment's pairs", "mlp", GEMM, "body(row + i * 16 + e * 8,", "body(row + i * 16,"),
    Mutant("a thread's rows of A", "mlp", GEMM, "from_a[A::offset(i * 16 + r, k)]", "from_a[A::offset(i * 16, k)]"),
    Mutant("columns of a thread's pairs", "mlp", GEMM, "j / 2 * 32 + j % 2 * 2, pair[0]", "j / 2 * 32, pair[0]"),
    # ---- convolutions
    Mutant("no barrier after a phase is opened", "conv", CONV, "(axis.taps);\n  }\n  __syncthreads();",
           "(axis.taps);\n  }"),
    Mutant("no barrier before the places of C are read", "conv", CONV,
           "}\n  __syncthreads();\n  constexpr int pairs", "}\n  constexpr int pairs"),
    Mutant("windows reach over the edge", "conv", CONV, "static_cast<unsigned>(window.axis[i].size)", "0x7fffffffu"),
    Mutant("positions that do not exist", "conv", CONV, "if (!exists) place.at[0]", "if (false) place.at[0]"),
    Mutant("channels that do not exist", "conv", CONV, "i < channels && contains", "contains"),
    Mutant("vectors of channels that do not exist", "conv", CONV, "first_channel() < (kKIsPosition ? mn_left : depth)",
           "true"),
    Mutant("the next channel is not the next tap's first", "conv", CONV,
           "if (t.channel == operand.channels.count()) {", "if (false) {"),
    Mutant("the positions of a thread are all the same", "conv", CONV,
           "if (distance > 0) advance(p, window, distance);", ""),
    Mutant("a phase begins with the first tap", "conv", CONV, "int at = axis.tap_first;", "int at = 0;"),
    Mutant("the taps of a phase are neighbours", "conv", CONV, "jump = next(tap + 1) - tap;", "jump = 1;"),
    Mutant("images do not follow each other", "conv", CONV, "p.image += distance;", ""),
    Mutant("every group is the first", "conv", CONV, "group(operand.data + group * operand.group_stride)",
           "group(operand.data + 0 * group)"),
    Mutant("the derivative of another element", "conv", CONV, "operand.saved[from - operand.data]",
           "operand.saved[0]"),
    Mutant("a division that is none", "conv", CONV, "(high + static_cast<uint32_t>(n)) >> shift", "high >> shift"),
    Mutant("a second column that does not exist", "conv", CONV, "cols[col + 1] < 0 ? -1 : rows", "rows"),
    Mutant("columns that are no neighbours in memory", "conv", CONV, "neighbours = second_at == at + 1",
           "neighbours = second_at >= 0"),
    Mutant("C where there is none", "conv", CONV, "if (m >= extents.m || n >= extents.n) continue;", ""),
    Mutant("parts of C where there is none", "conv", CONV, "if (m >= extents.m || n >= extents.n) return;", ""),
    Mutant("a part missing from the sum of a row", "conv", CONV, "++split) sum += sums", "++split) sum = sums"),
    Mutant("the bias of the wrong channel", "conv", CONV, "group * task.n + n + 1, value", "group * task.n + n, value"),
    Mutant("filters that do not exist", "conv", CONV, "if (index >= task.count) return;", ""),
    Mutant("depthwise windows reach over the edge", "conv_depthwise", DEPTHWISE, "if (!inside) continue;", ""),
    Mutant("the same for the weight's gradient", "conv_depthwise", DEPTHWISE, "if (inside) sum[t]", "sum[t]"),
    Mutant("depthwise channels that do not exist", "conv_depthwise", DEPTHWISE,
           "channel < task.channels && position < end", "position < end"),
    Mutant("no barrier while a block sums", "conv_depthwise", DEPTHWISE, "__syncthreads();\n      if (worker",
           "if (worker"),
    Mutant("no barrier before the next sum", "conv_depthwise", DEPTHWISE, "__syncthreads();  // the sums are read",
           "//"),
    Mutant("elements that depthwise kernels do not have", "conv_depthwise", DEPTHWISE,
           "if (index >= task.count) return;", ""),
    Mutant("sums of a split that do not exist", "conv_depthwise", DEPTHWISE, "if (index >= count) return;", ""),
]  # fmt: skip


def run(folder: Path, check: str, kernels: Path) -> subprocess.CompletedProcess:
    """Compiles tests/emulator/checks/<check>.cpp with these kernels and runs it; the compiler has to succeed."""
    objects = ROOT / "build" / "emulator"
    program = folder / check
    command = [
        *build_native.compiler(), *build_native.emulator_flags(), "-O1", f"-I{kernels}",
        str(build_native.EMULATOR / "checks" / f"{check}.cpp"),
        str(objects / "tests" / "emulator" / "simt.o"), str(objects / "tests" / "emulator" / "cuda_runtime.o"),
        str(objects / "csrc" / "kernels" / "cpu" / "activation.o"), "-o", str(program),
    ]  # fmt: skip
    compiled = subprocess.run(command, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    return subprocess.run([str(program)], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("check", ["gemm", "activation", "pool", "conv", "conv_depthwise", "mlp"])
def test_the_sources_as_they_are_succeed(tmp_path, check):
    result = run(tmp_path, check, ROOT / "csrc" / "kernels")
    assert result.returncode == 0, result.stdout


def run_mutant(folder: Path, mutant: Mutant) -> int:
    """The program's status."""
    kernels = folder / "kernels"
    shutil.copytree(ROOT / "csrc" / "kernels", kernels)
    source = kernels / "cuda" / mutant.file
    text = source.read_text()
    assert mutant.old in text, "the source has changed; so must the mutant"
    source.write_text(text.replace(mutant.old, mutant.new))
    return run(folder, mutant.check, kernels).returncode


@pytest.fixture(scope="module")
def statuses(request, tmp_path_factory):
    """Of the mutants that were asked for, as they come: to compile one takes seconds, and every core takes some."""
    wanted = [item.callspec.params["mutant"] for item in request.session.items if item.name.startswith("test_mutant")]
    pool = ThreadPoolExecutor(os.cpu_count())
    yield {mutant: pool.submit(run_mutant, tmp_path_factory.mktemp("mutant"), mutant) for mutant in wanted}
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.what)
def test_mutant_fails(statuses, mutant):
    assert statuses[mutant].result() != 0
