"""Charts for a report, each an <img> with its picture inside; by matplotlib, from the extra `report`."""

import base64
import html
import io
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from dsv4_jax.errors import RequestError

_INK, _LOUD = "#1f3a5f", "#d1495b"


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, list[Any]]:
    """A figure and its axes, row by row."""
    try:
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise RequestError("a report needs matplotlib", hint="pip install 'dsv4-jax[report]'") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).reshape(-1))


def _image(figure: Any, alt: str, *, kind: Literal["svg", "png"] = "svg") -> str:
    """The figure as an <img> that holds it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=150)
    data = base64.b64encode(buffer.getvalue()).decode()
    mime = "image/svg+xml" if kind == "svg" else "image/png"
    return f'<img alt="{html.escape(alt)}" src="data:{mime};base64,{data}">'


def score_chart(tasks: Mapping[str, Any]) -> str:
    """Scores between 0 and 1 with their intervals; chance as a mark."""
    shares = {name: task for name, task in tasks.items() if task["metric"] != "bits_per_byte"}
    if not shares:
        return ""
    figure, (axes,) = _figure(8, 0.7 + 0.42 * len(shares))
    for place, task in enumerate(shares.values()):
        low, high = task["interval"]
        axes.plot([low, high], [place, place], color=_INK, linewidth=2, solid_capstyle="butt")
        axes.plot(task["score"], place, "o", color=_INK, markersize=7)
        if "chance" in task:
            axes.plot(task["chance"], place, "|", color=_LOUD, markersize=16, markeredgewidth=2)
    axes.set_yticks(range(len(shares)), list(shares))
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(len(shares) - 0.5, -0.5)
    axes.set_xlabel("score, 95% interval; red: chance")
    _bare(axes)
    return _image(figure, "scores with 95% intervals")


def acceptance_chart(accepted: Mapping[str, Any]) -> str:
    """By task: the share of drafts that stood, by their position in a step."""
    figure, (axes,) = _figure(8, 2.4)
    width = 0.8 / len(accepted)
    for number, (name, each) in enumerate(accepted.items()):
        shares = each["by_position"]
        places = np.arange(len(shares)) + 1 + (number - (len(accepted) - 1) / 2) * width
        axes.bar(places, shares, width * 0.9, label=name)
    axes.set_xticks(range(1, 1 + max(len(each["by_position"]) for each in accepted.values())))
    axes.set_xlabel("position of the draft")
    axes.set_ylabel("share that stood")
    axes.set_ylim(0, 1)
    axes.legend(frameon=False)
    _bare(axes)
    return _image(figure, "share of drafts that stood, by position")


def load_chart(load: np.ndarray) -> str:
    """How many tokens each expert (columns) of each layer (rows) got, 1 where all got as many."""
    figure, (axes,) = _figure(8, 1.4 + 0.14 * len(load))
    shares = load / load.sum(1, keepdims=True) * load.shape[1]
    most = max(2.0, float(np.quantile(shares, 0.99)))
    image = axes.imshow(shares, aspect="auto", cmap="magma_r", vmin=0, vmax=most)
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.set_yticks(range(0, len(load), max(len(load) // 12, 1)))
    figure.colorbar(image, ax=axes, label="load, 1 is even", pad=0.01)
    return _image(figure, "load of each expert in each layer", kind="png")


def index_chart(maps: Mapping[int, np.ndarray]) -> str:
    """By layer: which compressed entries (rows) each token (columns) attended to."""
    shown = sorted(maps)[:6]
    rows = -(-len(shown) // 2)
    figure, axes = _figure(8, 2.4 * rows, rows, 2)
    for layer, axis in zip(shown, axes, strict=False):
        chosen = maps[layer]
        tokens, entries = len(chosen), max(int(chosen.max()) + 1, 1)
        picture = np.zeros((entries, tokens))
        token, place = np.nonzero(chosen >= 0)
        picture[chosen[token, place], token] = 1
        axis.imshow(picture, aspect="auto", cmap="Blues", interpolation="nearest", origin="upper", vmax=1.2)
        axis.set_title(f"layer {layer}", fontsize=9)
        axis.set_xlabel("token", fontsize=8)
        axis.set_ylabel("entry", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.yaxis.get_major_locator().set_params(integer=True)
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    return _image(figure, "compressed entries that each token attended to", kind="png")


def _bare(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="x", color="#e3e8ee")
    axes.set_axisbelow(True)
