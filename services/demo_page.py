"""The demo's page: what is lost without each component, and what each head finds alike. One file, no network."""

import html
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from schemas.components import Component
from services.roles import Retrieval, Selective, Task
from services.store import Store
from workers.toyworld.attributes import VALUES

_QUERIES: Final = 5
_SHOWN: Final = 10
_STYLE: Final = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; }
td, th { padding: .15rem .6rem; text-align: right; font-weight: normal; border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; }
td { font-variant-numeric: tabular-nums; }
.row { display: flex; gap: .35rem; margin: .35rem 0; align-items: center; }
.row img { width: 64px; height: 64px; image-rendering: pixelated; }
.of-first img:first-child { outline: 3px solid #c33; margin-right: .8rem; }
.wrong { opacity: .35; }
code { font-size: .95em; }
"""


@dataclass(frozen=True)
class Findings:
    """What the page shows; by the task's name, but for the losses."""

    losses: dict[Component, dict[str, float]]
    retrievals: dict[str, Retrieval]
    neurons: dict[str, list[Selective]]
    pairs: dict[str, list[Selective]]


def write_page(folder: Path, store: Store, tasks: list[Task], findings: Findings) -> None:
    """Writes ``index.html`` into ``folder``, which holds the images that it shows."""
    whole = store.representation()
    rows = "".join(
        f"<tr><th>{task.name}</th><td>{task.accuracy(whole):.1%}</td><td>{task.chance:.1%}</td></tr>" for task in tasks
    )
    sections = "".join(_retrieval(folder, store, task, findings.retrievals[task.name]) for task in tasks)
    neurons = "".join(_selective(folder, store, task, findings.neurons[task.name]) for task in tasks)
    pairs = "".join(_selective(folder, store, task, findings.pairs[task.name]) for task in tasks)
    model = store.manifest.model
    text = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Spectrograph: what the parts of {html.escape(model.name)} see</title><style>{_STYLE}</style></head><body>
<h1>What the parts of {html.escape(model.name)} see</h1>
<p>{len(whole)} scenes went through the model once. What each of its {model.layers * model.heads} heads,
{model.layers} MLPs and {(model.layers - 1) * model.neurons} neurons added to each image's representation lies in
<code>{html.escape(store.folder.path.name)}/</code>; everything below was computed from there, without the image
encoder.</p>
<h2>Which text fits?</h2>
<table><tr><th>attribute</th><th>right</th><th>chance</th></tr>{rows}</table>
<h2>What is lost without a component</h2>
<p>Points of accuracy lost when the component's contribution is replaced by its mean over all images.</p>
{_losses(tasks, findings.losses)}
{sections}
<h2>What single neurons are significant for</h2>
<p>A neuron of an MLP adds to the representation through the heads of later layers. It is significant for the 2% of
images in which that differs the most from its mean; the first {_SHOWN} are shown, and those that do not share what most
of them share are pale. The neurons are those whose images agree the most on each attribute. The other word is the one
whose text lies the most along the neuron's direction, which is where its effect points: it may be another one, for a
neuron may also speak against what it is significant for.</p>
{neurons}
<h2>What neuron-head pairs of a ResNet are significant for</h2>
<p>The same of another model, from <code>pairs/</code>: what one head of its attention pool reads of one channel is a
single number times a fixed direction.</p>
{pairs}
</body></html>
"""
    (folder / "index.html").write_text(text, encoding="utf-8")


def _losses(tasks: list[Task], losses: dict[Component, dict[str, float]]) -> str:
    largest = {task.name: max(*(loss[task.name] for loss in losses.values()), 1e-9) for task in tasks}
    head = "".join(f"<th>{task.name}</th>" for task in tasks)
    rows = []
    for component, loss in losses.items():
        cells = "".join(
            f'<td style="background: rgb(204 51 51 / {max(loss[task.name], 0) / largest[task.name] * 0.8:.2f})">'
            f"{100 * loss[task.name]:.1f}</td>"
            for task in tasks
        )
        rows.append(f"<tr><th><code>{component}</code></th>{cells}</tr>")
    return f"<table><tr><th>component</th>{head}</tr>{''.join(rows)}</table>"


def _selective(folder: Path, store: Store, task: Task, found: list[Selective]) -> str:
    sources = store.images()["source"].to_pylist()
    lines = []
    for one in found:
        pictures = (_picture(folder, sources[at], right=task.truth[at] == one.value) for at in one.images[:_SHOWN])
        values = VALUES[task.name]
        lines.append(
            f"<p><code>{one.component}</code>: {one.share:.0%} of its {len(one.images)} images share the {task.name} "
            f"<b>{values[one.value]}</b>; along its direction lies <b>{values[one.named]}</b></p>"
            f'<div class="row">{"".join(pictures)}</div>'
        )
    return "".join(lines)


def _picture(folder: Path, source: str, *, right: bool) -> str:
    place = html.escape(os.path.relpath(source, folder.resolve()))
    return f'<img src="{place}" alt="" class="{"" if right else "wrong"}">'


def _retrieval(folder: Path, store: Store, task: Task, found: Retrieval) -> str:
    sources = store.images()["source"].to_pylist()
    lines = []
    for query in np.linspace(0, len(sources) - 1, _QUERIES).astype(int):
        pictures = (
            _picture(folder, sources[image], right=task.truth[image] == task.truth[query])
            for image in (query, *found.neighbours[query])
        )
        lines.append(f'<div class="row of-first">{"".join(pictures)}</div>')
    return (
        f"<h2>Alike in {task.name}, says <code>{found.head}</code></h2>"
        f"<p>Left, an image; then those whose contribution of this head points the most alike. "
        f"{found.precision:.0%} share its {task.name}; the others are pale.</p>{''.join(lines)}"
    )
