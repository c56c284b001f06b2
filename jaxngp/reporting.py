"""What a run did, as one HTML page without anything to load: curves, views beside the truth, config, environment."""

from __future__ import annotations

import base64
import functools
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxngp.config import InputError, RunConfig, field_help
from jaxngp.evaluation import Evaluation, ViewPicture, ViewScore
from jaxngp.pictures import Image8, depth_image, encode_webp, error_image, hatched, to_uint8

CURVES = {
    "psnr": ("PSNR of training batches", "dB"),
    "loss": ("training loss", ""),
    "error": ("training error", ""),
    "samples_per_second": ("samples per second", "1/s"),
    "rays": ("rays per step", ""),
    "dropped_samples": ("samples of rays that did not fit a step", ""),
    "occupied_fraction": ("occupied part of the grid", ""),
    "skipped": ("skipped updates", ""),
}
"""What is drawn of metrics.jsonl, by its key: a title and a unit."""

LOGARITHMIC = ("loss", "error")
SHEET_ROWS = 8
COLUMNS = "From left to right: truth, prediction, four times the error, depth (nearer is brighter)."
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2330; background: #fff; margin: 2rem auto; max-width: 72rem;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #d9dee6; }
table { border-collapse: collapse; } td, th { padding: .15rem .9rem .15rem 0; text-align: left; vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; } figure { margin: 1rem 0; }
figcaption { color: #58637a; } img { max-width: 100%; height: auto; image-rendering: auto; }
.row { display: grid; grid-template-columns: repeat(4, 1fr); gap: .4rem; } .row img { width: 100%; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: .5rem; }
.curves svg, .wide svg { width: 100%; height: auto; } .headline { font-size: 1.15rem; } code { font-size: .9em; }
details > summary { cursor: pointer; }
"""


@dataclass(frozen=True)
class View:
    """A view's score and its pictures, (H, W, 3) u8 each."""

    score: ViewScore
    pictures: tuple[Image8, Image8, Image8, Image8]  # truth, prediction, error x 4, depth

    @classmethod
    def of(cls, score: ViewScore, picture: ViewPicture) -> View:
        """The pictures that the page shows; masked pixels are hatched in truth and error."""
        truth, error = to_uint8(picture.truth), error_image(picture.prediction, picture.truth)
        if picture.keep is not None:
            truth, error = hatched(truth, picture.keep), hatched(error, picture.keep)
        depth = depth_image(picture.depth, picture.opacity)
        return cls(score, (truth, to_uint8(picture.prediction), error, depth))


@dataclass(frozen=True)
class Shown:
    """The views that a page shows: the worst, the median and the best, and some evenly spread."""

    named: dict[str, View]
    sheet: tuple[View, ...]


def choose_views(views: Iterable[tuple[ViewScore, ViewPicture]], num_views: int) -> tuple[list[ViewScore], Shown]:
    """All scores, and the views that are shown. Holds the pictures of few of them: all might not fit the memory."""
    spread = set(np.linspace(0, num_views - 1, SHEET_ROWS).round().astype(int).tolist())
    scores: list[ViewScore] = []
    sheet: list[View] = []
    worst: View | None = None
    best: View | None = None
    for index, (score, picture) in enumerate(views):
        view = View.of(score, picture)
        scores.append(score)
        worst = view if worst is None or score.psnr < worst.score.psnr else worst
        best = view if best is None or score.psnr > best.score.psnr else best
        if index in spread:
            sheet.append(view)
    assert worst is not None
    assert best is not None
    return scores, Shown({"worst view": worst, "best view": best}, tuple(sheet))


def page(
    title: str,
    *,
    config: RunConfig,
    log: Sequence[Mapping[str, float]],
    environment: Mapping[str, Any],
    headline: str,
    training: Mapping[str, Any],
    evaluation: Evaluation | None = None,
    shown: Shown | None = None,
    pictures: Mapping[str, Image8] | None = None,
) -> str:
    """The page. log: the lines of metrics.jsonl. pictures: others to show, by their names."""
    parts = [f"<h1>{html.escape(title)}</h1>", f'<p class="headline">{html.escape(headline)}</p>', _table(training)]
    if shown is not None:
        parts += ["<h2>Views</h2>", f"<p>{COLUMNS}</p>"]
        for name, view in shown.named.items():
            parts.append(_row(f"{name}: {view.score.name}", view))
    if evaluation is not None and evaluation.num_views > 1:
        parts.append(f'<div class="wide">{_view_chart(evaluation)}</div>')
    for name, picture in (pictures or {}).items():
        parts.append(f"<figure>{_image(picture, name)}<figcaption>{html.escape(name)}</figcaption></figure>")
    parts += ["<h2>Training</h2>", f'<div class="curves">{"".join(_curves(log))}</div>']
    if shown is not None:
        parts += ["<h2>More views</h2>", f"<p>{COLUMNS}</p>"]
        parts += [_row(view.score.name, view) for view in shown.sheet]
    parts += ["<h2>Configuration</h2>", _config_table(config), "<h2>Environment</h2>", _table(environment)]
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    )
    body = "".join(parts)
    return f'<!doctype html><html lang="en"><head>{head}<style>{_STYLE}</style></head><body>{body}</body></html>\n'


def _row(caption: str, view: View) -> str:
    names = ("truth", "prediction", "error x 4", "depth")
    images = "".join(_image(picture, name) for picture, name in zip(view.pictures, names, strict=True))
    score = f"{caption}: {view.score.psnr:.2f} dB, SSIM {view.score.ssim:.4f}"
    return f'<figure><figcaption>{html.escape(score)}</figcaption><div class="row">{images}</div></figure>'


def _image(image: Image8, name: str) -> str:
    data = base64.b64encode(encode_webp(image)).decode()
    height, width = image.shape[:2]
    name = html.escape(name)
    return f'<img width="{width}" height="{height}" alt="{name}" title="{name}" src="data:image/webp;base64,{data}">'


def _table(values: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><th>{html.escape(name)}</th><td>{_cell(value)}</td></tr>" for name, value in values.items())
    return f"<table>{rows}</table>"


def _cell(value: Any) -> str:
    return html.escape(f"{value:,.4g}" if isinstance(value, float) else str(value))


def _config_table(config: RunConfig) -> str:
    """Every field with its value and meaning, by group."""
    groups, rows = [], []
    for left, text in field_help(config):
        if "=" not in left:
            groups.append((left, text))
            rows.append(f'<tr><th colspan="3"><br>{html.escape(left)}: {html.escape(text)}</th></tr>')
        else:
            path, _, value = left.partition("=")
            cells = (f"<code>{html.escape(path)}</code>", f"<code>{html.escape(value)}</code>", html.escape(text))
            rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<details><summary>all fields</summary><table>{''.join(rows)}</table></details>"


# Charts.


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise InputError("matplotlib, which draws the curves, is not installed: pip install .[report]") from None
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "jaxngp"  # the same run, the same bytes
    matplotlib.rcParams["svg.fonttype"] = "none"
    import matplotlib.pyplot as plt

    return plt


def _svg(figure: Any, plt: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    plt.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]


def _curves(log: Sequence[Mapping[str, float]]) -> Iterable[str]:
    """A chart over the steps of each of CURVES that the log has, with the seconds on a second axis."""
    plt = _matplotlib()
    steps, seconds = (np.array([entry[key] for entry in log], float) for key in ("step", "seconds"))
    for key, (title, unit) in CURVES.items():
        values = np.array([entry.get(key, np.nan) for entry in log], float)
        if not np.isfinite(values).any() or (key in ("skipped", "dropped_samples") and not np.nanmax(values)):
            continue
        figure, axes = plt.subplots(figsize=(4.6, 3.0), layout="constrained")
        axes.plot(steps, values, color="#2b62c9", linewidth=1.2)
        axes.set_title(f"{title} ({unit})" if unit else title, fontsize=10)
        axes.set_xlabel("step")
        if key in LOGARITHMIC and np.nanmin(values) > 0:
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        if len(steps) > 1 and np.all(np.diff(seconds) > 0):
            to_seconds = functools.partial(np.interp, xp=steps, fp=seconds)
            above = axes.secondary_xaxis(
                "top", functions=(to_seconds, functools.partial(np.interp, xp=seconds, fp=steps))
            )
            above.set_xlabel("seconds of training", fontsize=8)
            above.tick_params(labelsize=8)
        yield _svg(figure, plt)


def _view_chart(evaluation: Evaluation) -> str:
    plt = _matplotlib()
    figure, axes = plt.subplots(figsize=(9.2, 2.6), layout="constrained")
    values = np.sort(np.array(evaluation.view_psnr))
    axes.bar(np.arange(len(values)), values - values.min() + 1, bottom=values.min() - 1, color="#8fb0e8", width=0.85)
    axes.axhline(evaluation.psnr, color="#c2453d", linewidth=1, label=f"mean {evaluation.psnr:.2f} dB")
    axes.set_title(f"PSNR of the {len(values)} views, from the worst to the best (dB)", fontsize=10)
    axes.set_xticks([])
    axes.legend(fontsize=8)
    return _svg(figure, plt)


# TensorBoard.


def write_tensorboard(
    log: Sequence[Mapping[str, float]], folder: Path, images: Mapping[str, NDArray[np.uint8]]
) -> None:
    """The log and images (H, W, 3) as a TensorBoard run in a folder, which must be empty."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise InputError("tensorboardX is not installed: pip install .[report]") from None
    with SummaryWriter(str(folder)) as writer:
        for entry in log:
            for key, value in entry.items():
                if key != "step" and np.isfinite(value):
                    writer.add_scalar(f"train/{key}", value, int(entry["step"]), walltime=entry["seconds"])
        for name, image in images.items():
            writer.add_image(name, image, int(log[-1]["step"]), walltime=log[-1]["seconds"], dataformats="HWC")
