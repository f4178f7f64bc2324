"""The report of `rotsparse sparsify`: what dropping coordinates costs in each basis."""

import base64
import math
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from rotsparse._core.printable import html as escape
from rotsparse._core.printable import markdown
from rotsparse.report import plot
from rotsparse.report.figures import GREY, LEARNED, PALETTE, png
from rotsparse.report.page import fact_rows, filled

NAMES = {
    "none": "no rotation (TEAL)",
    "wina": "weight-aware scores (WINA)",
    "hadamard": "random Hadamard",
    "pca": "PCA (LaRoSA)",
    "weighted": "weighted PCA",
    "fisher": "Fisher-weighted PCA",
    "learned": "learned",
}
CHOICES = {
    "largest": "largest of each token",
    "thresholds": "thresholds",
    "budgets": "thresholds and budgets",
    "trained": "the result, with trained shifts",
}
DRAWN = ("largest", "thresholds", "budgets")
SITES = {"attention": "q, k, v", "heads": "o", "input": "gate, up", "hidden": "down"}


def title(results: Mapping[str, Any]) -> str:
    whole = results["whole"]
    return (
        f"Rise of the cross-entropy, and divergence from the whole model, in nats a token on {results['tokens']:,} "
        f"held-out tokens; whole model {whole:.4f}, perplexity {math.exp(whole):.2f}"
    )


def rows(results: Mapping[str, Any]) -> list[list[str]]:
    """The table, its head first: a row for each basis and choice."""
    shares = sorted({row["keep"] for row in results["rows"]}, reverse=True)
    found = {(row["method"], row["choice"], row["keep"]): row for row in results["rows"]}
    table = [["basis", "kept", *(f"{1 - share:.0%} dropped" for share in shares)]]
    for choice in CHOICES:
        for method in NAMES:
            cells = [found.get((method, choice, share)) for share in shares]
            if any(cells):
                texts = (f"{_risen(of, '.3f')}, {of['divergence']:.3f}" if of else "" for of in cells)
                table.append([NAMES[method], CHOICES[choice], *texts])
    return table


def _risen(row: Mapping[str, Any], form: str) -> str:
    """The rise and its standard error, which one sequence alone does not have."""
    error = "" if row["rise_error"] is None else f" ± {row['rise_error']:{form}}"
    return f"{row['rise']:{form}}{error}"


def table(results: Mapping[str, Any]) -> str:
    """The same in Markdown."""
    head, *body = (f"| {' | '.join(map(markdown, row))} |" for row in rows(results))
    return "\n".join([f"{title(results)}:", "", head, "|---" * head.count(" | ") + "|---|", *body, ""])


def figures(results: Mapping[str, Any]) -> dict[str, bytes]:
    """`rise`: the rise of the cross-entropy against the share dropped, a panel for each choice. `budgets`: the share
    that each site keeps."""
    return {"rise": png(_rise(results)), "budgets": png(_budgets(results))}


def _rise(results) -> Figure:
    drawn = Figure(figsize=(9.6, 3.6), layout="constrained", dpi=150, facecolor="white")
    panels = drawn.subplots(1, len(DRAWN), sharey=True)
    colours = {"none": GREY, "pca": PALETTE[0], "learned": LEARNED}
    colours |= dict(zip([name for name in NAMES if name not in colours], PALETTE[1:], strict=True))
    for ax, choice in zip(panels, DRAWN, strict=True):
        for method in NAMES:
            at = sorted((1 - r["keep"], r["divergence"], r["divergence_error"] or 0) for r in results["rows"]
                        if (r["method"], r["choice"]) == (method, choice))  # fmt: skip
            if at:
                x, y, error = zip(*at, strict=True)
                width = 2.4 if method == "learned" else 1.4
                ax.errorbar(x, y, error, color=colours[method], lw=width, marker="o", ms=3, label=NAMES[method])
        ax.set_yscale("log")
        ax.set_title(CHOICES[choice], fontsize=9, loc="left")
        ax.set_xlabel("share of the weights that is not read")
        ax.xaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
    panels[0].set_ylabel("divergence, nats a token")
    for ax in panels:
        plot.tidy(ax, plot.LIGHT)
    panels[0].legend(fontsize=7, frameon=False)
    return drawn


def _budgets(results) -> Figure:
    """The shares kept by the chosen plan, a line for each kind of site."""
    drawn = Figure(figsize=(6.4, 3.2), layout="constrained", dpi=150, facecolor="white")
    ax = drawn.subplots()
    kept = results["kept"]
    for (site, label), colour in zip(SITES.items(), (PALETTE[0], PALETTE[1], LEARNED, PALETTE[2]), strict=True):
        at = sorted((int(name.split(".")[0]), share) for name, share in kept.items() if name.split(".")[1] == site)
        if at:
            ax.plot(*zip(*at, strict=True), "o-", ms=3, color=colour, label=f"{site} ({label})")
    ax.set_ylim(0, 1.02)
    ax.set_xlabel("layer")
    ax.set_ylabel("share of coordinates that stay")
    ax.yaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
    plot.tidy(ax, plot.LIGHT)
    ax.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return drawn


def page(results: Mapping[str, Any], config: Mapping[str, Any], drawn: Mapping[str, bytes]) -> str:
    """One self-contained HTML page."""
    head, *body = rows(results)
    captions = {
        "rise": "How far the next-token distributions move from those of the whole model, by the share of the weights "
        "that need not be read, with the standard error over sequences. The vertical axis is logarithmic.",
        "budgets": f"The share of the coordinates that each site keeps where the model reads {results['keep']:.0%} of "
        f"its weights, in the basis {NAMES[results['method']]}.",
    }
    pictures = {
        name: f'<figure><img alt="{escape(captions[name])}" src="data:image/png;base64,'
        f'{base64.b64encode(of).decode("ascii")}"><figcaption>{escape(captions[name])}</figcaption></figure>'
        for name, of in drawn.items()
    }
    told = {name: value for name, value in config.items() if name not in ("versions", "again", "inputs")}
    return filled(
        "sparsity.html",
        title=escape(title(results)),
        finding=escape(finding(results)),
        rise=pictures["rise"],
        budgets=pictures["budgets"],
        head="".join(f"<th>{escape(cell)}</th>" for cell in head),
        rows="".join(
            f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
            for row in body
        ),
        again=escape(str(config.get("again", ""))),
        facts=fact_rows(told.items()),
    )


def finding(results: Mapping[str, Any]) -> str:
    """The first sentence: what the share asked for costs, and what the best of the others costs by the same choice."""
    at = [row for row in results["rows"] if row["keep"] == results["keep"]]
    ours = [row for row in at if row["method"] == results["method"] and row["choice"] == results["choice"]]
    if not ours:
        return title(results)
    (own,) = ours
    dropped, whole = 1 - results["keep"], results["whole"]
    said = (
        f"With {dropped:.0%} of the weights not read, perplexity rises from {math.exp(whole):.2f} to "
        f"{math.exp(whole + own['rise']):.2f} ({_risen(own, '.4f')} nats a token)"
    )
    others = [row for row in at if row["method"] != results["method"]]
    if not others:
        return f"{said}."
    best = min(others, key=lambda row: row["divergence"])
    ratio = own["divergence"] / best["divergence"]
    return (
        f"{said}. Its divergence from the whole model is {ratio:.2f} of that of the best other basis, "
        f"{NAMES[best['method']]} with {CHOICES[best['choice']]}."
    )
