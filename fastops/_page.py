"""The page of Explanation.save_html: one file of HTML and CSS, which needs no network and runs no script."""

from html import escape
from typing import TYPE_CHECKING

from fastops.replace import Row

if TYPE_CHECKING:
    from fastops.explain import Explanation

_STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2330; background: #fff; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; }
h2 { font-size: 1.1rem; margin-top: 2rem; }
.machine, .note { color: #5b6475; }
.advice { background: #eef4ff; border-left: 4px solid #2f6fde; padding: .6rem 1rem; }
table { border-collapse: collapse; width: 100%; }
th { text-align: left; font-weight: 600; border-bottom: 1px solid #c9d0dc; }
td, th { padding: .25rem .6rem .25rem 0; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.bar { width: 35%; }
.bar div { background: #2f6fde; height: .8rem; border-radius: 2px; min-width: 1px; }
@media (prefers-color-scheme: dark) {
  body { color: #dfe4ee; background: #14181f; }
  .advice { background: #1d2a42; }
}
"""


def page(explanation: "Explanation") -> str:
    """The whole page."""
    title = f"fastops: {explanation.model}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="machine">{escape(explanation.inputs)}; {escape(explanation.machine)}</p>',
        f'<p class="advice">{escape(explanation.advice())}</p>',
        *(_ways(explanation, mode) for mode in explanation.milliseconds),
        *(
            f"<h2>{escape(mode.capitalize())}</h2><p>Not measured: {escape(why)}</p>"
            for mode, why in explanation.problems.items()
        ),
        "<h2>Where PyTorch's time goes, in inference</h2>",
        _table(
            ("modules", "share", "", "most in"),
            [
                (f"{layer.count} x {layer.kind}", f"{layer.share:.1%}", _Bar(layer.share), layer.most)
                for layer in explanation.layers
            ],
        ),
        "<h2>Left to PyTorch by replace_</h2>",
        _table(
            ("modules", "share", "", "why"),
            [(what, f"{share:.1%}", _Bar(share), why) for share, what, why in explanation.left()],
        ),
        "<h2>Kernels after replace_, in inference</h2>",
        _kernels(explanation),
        f"<h2>Replaced: {len(explanation.report.replaced)}</h2>",
        _table(("module", "was", "is"), [_shown(row) for row in explanation.report.replaced]),
    ]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(parts) + "\n</body></html>\n"


class _Bar(float):
    """A share as a bar."""


def _ways(explanation: "Explanation", mode: str) -> str:
    plain = explanation.milliseconds[mode]
    ways = sorted((way for way in explanation.ways if way.mode == mode), key=lambda way: -way.ratio)
    longest = max([plain, *(way.milliseconds for way in ways)])
    rows: list[tuple[object, ...]] = [("PyTorch", f"{plain:.3g} ms", _Bar(plain / longest), "")]
    for way in ways:
        told = f"{way.ratio:.2f} times as fast ({way.slowest:.2f} - {way.fastest:.2f})"
        if way.problem:
            told = f"{told}; {way.problem}" if way.ratio else f"not measured: {way.problem}"
        rows.append((way.call, f"{way.milliseconds:.3g} ms", _Bar(way.milliseconds / longest), told))
    return f"<h2>{escape(mode.capitalize())}</h2>" + _table(("", "time", "", "PyTorch's time by it"), rows)


def _kernels(explanation: "Explanation") -> str:
    times = explanation.calls.times("kernel")
    whole = sum(times.values())
    if not whole:
        return "<p>None.</p>"
    counts = {kernel: sum(row.kernel == kernel for row in explanation.calls) for kernel in times}
    rows = [(kernel, f"{counts[kernel]} calls", _Bar(time / whole), f"{time:.0f} us") for kernel, time in times.items()]
    note = '<p class="note">The kernel "aten" is PyTorch\'s own op.</p>'
    return _table(("kernel", "", "", "time"), rows) + note


def _shown(row: Row) -> tuple[str, str, str]:
    return row.name or "(root)", row.module, row.result


def _table(head: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    if not rows:
        return "<p>None.</p>"
    lines = ["<table><tr>" + "".join(f"<th>{escape(one)}</th>" for one in head) + "</tr>"]
    for row in rows:
        lines.append("<tr>" + "".join(map(_cell, row)) + "</tr>")
    return "\n".join([*lines, "</table>"])


def _cell(value: object) -> str:
    if isinstance(value, _Bar):
        return f'<td class="bar"><div style="width: {100 * min(max(value, 0.0), 1.0):.1f}%"></div></td>'
    text = str(value)
    number = text[:1].isdigit() and text.endswith(("ms", "%", "us", "calls"))
    return f'<td class="number">{escape(text)}</td>' if number else f"<td>{escape(text)}</td>"
