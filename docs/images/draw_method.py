"""Draws the picture of the method, once for a light and once for a dark background.

python docs/images/draw_method.py

Written by hand as SVG, because it is boxes, grids and arrows. A grid is an attention mask: a row for each query, a
column for each key, filled where the query attends to the key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).parent
PROMPT = ("Who", "is", "Ann's", "aunt", "?")
COMPLETION = ("Mary", ".")
ENCODED, ANSWER = len(PROMPT) - 1, 1 + len(COMPLETION)  # the last prompt token opens the answer
CELL = 15
WIDTH, HEIGHT = 920, 444


@dataclass(frozen=True)
class Theme:
    """Colours. `causal`, `bidirectional`, `mixed` are lines and fills; the text on them is `ink`."""

    ink: str
    faint: str
    panel: str
    empty: str
    causal: str
    bidirectional: str
    mixed: str


THEMES = {
    "light": Theme("#1f2328", "#59636e", "#f6f8fa", "#e4e8ed", "#2f74d0", "#d9730d", "#8250df"),
    "dark": Theme("#e6edf3", "#9198a1", "#161b22", "#2b323b", "#58a6ff", "#f0883e", "#bc8cff"),
}


class Drawing:
    """SVG elements in drawing order, in the colours of a theme."""

    def __init__(self, theme: Theme) -> None:
        self.theme = theme
        self.elements: list[str] = []

    def text(self, x: float, y: float, text: str, colour: str, size: float = 13, **style: str) -> None:
        attributes = {"text-anchor": "middle", **{name.replace("_", "-"): value for name, value in style.items()}}
        given = " ".join(f'{name}="{value}"' for name, value in attributes.items())
        self.elements.append(f'<text x="{x:g}" y="{y:g}" fill="{colour}" font-size="{size:g}" {given}>{text}</text>')

    def box(
        self, x: float, y: float, width: float, height: float, fill: str, stroke: str = "none", opacity: float = 1
    ) -> None:
        self.elements.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" fill="{fill}" '
            f'fill-opacity="{opacity:g}" stroke="{stroke}" stroke-width="1.5"/>'
        )

    def arrow(self, path: str, colour: str) -> None:
        marker = f"head-{colour.removeprefix('#')}"
        self.elements.append(
            f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2" marker-end="url(#{marker})"/>'
        )

    def mask(self, x: float, y: float, queries: int, keys: int, colour_of: Callable[[int, int], str | None]) -> None:
        """A grid of cells; `colour_of(query, key)` is `None` where the key is hidden."""
        for query in range(queries):
            for key in range(keys):
                colour = colour_of(query, key) or self.theme.empty
                self.elements.append(
                    f'<rect x="{x + key * CELL:g}" y="{y + query * CELL:g}" width="{CELL - 2}" height="{CELL - 2}" '
                    f'rx="2" fill="{colour}"/>'
                )

    def svg(self) -> str:
        heads = "".join(
            f'<marker id="head-{colour.removeprefix("#")}" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="5" '
            f'markerHeight="5" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{colour}"/></marker>'
            for colour in dict.fromkeys([self.theme.causal, self.theme.bidirectional, self.theme.mixed])
        )
        title = "Two streams encode the prompt; each layer mixes their keys and values; the answer attends to both"
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
                "font-family=\"-apple-system, 'Segoe UI', Helvetica, Arial, 'DejaVu Sans', sans-serif\">",
                f"<title>{title}</title>",
                f"<defs>{heads}</defs>",
                *self.elements,
                "</svg>",
                "",
            ]
        )


def stream(drawing: Drawing, x: float, title: str, adapter: str, colour: str, causal: bool) -> None:
    """One encoding of the prompt: its mask and its adapter."""
    theme, width = drawing.theme, 200
    drawing.box(x, 84, width, 196, colour, colour, opacity=0.08)
    drawing.text(x + width / 2, 108, title, colour, 15, font_weight="600")
    left = x + (width - ENCODED * CELL) / 2
    drawing.mask(left, 126, ENCODED, ENCODED, lambda query, key: colour if not causal or key <= query else None)
    drawing.text(
        x + width / 2, 210, "attends to what came before" if causal else "attends to the whole prompt", theme.faint, 12
    )
    drawing.box(x + 25, 228, width - 50, 34, colour, colour, opacity=0.22)
    drawing.text(x + width / 2, 250, adapter, theme.ink)


def mixing(drawing: Drawing, x: float) -> None:
    theme, width = drawing.theme, 176
    drawing.box(x, 116, width, 132, theme.mixed, theme.mixed, opacity=0.1)
    drawing.text(x + width / 2, 140, "mixed keys, values", theme.mixed, 15, font_weight="600")
    drawing.text(x + width / 2, 168, f'<tspan fill="{theme.causal}">(1 &#8722; &#945;) · causal</tspan>', theme.ink, 14)
    drawing.text(
        x + width / 2, 190, f'<tspan fill="{theme.bidirectional}">+ &#945; · bidirectional</tspan>', theme.ink, 14
    )
    drawing.text(x + width / 2, 217, "&#945; from a trained &#952;,", theme.faint, 12)
    drawing.text(x + width / 2, 234, "one for keys, one for values", theme.faint, 12)


def answer(drawing: Drawing, x: float) -> None:
    theme, width = drawing.theme, 200
    drawing.box(x, 84, width, 196, theme.causal, theme.causal, opacity=0.08)
    drawing.text(x + width / 2, 108, "answer", theme.causal, 15, font_weight="600")

    def colour_of(query: int, key: int) -> str | None:
        if key < ENCODED:
            return theme.mixed
        return theme.causal if key - ENCODED <= query else None

    left = x + (width - (ENCODED + ANSWER) * CELL) / 2
    drawing.mask(left, 134, ANSWER, ENCODED + ANSWER, colour_of)
    drawing.text(x + width / 2, 202, "attends to the mixture", theme.faint, 12)
    drawing.text(x + width / 2, 218, "and to itself", theme.faint, 12)
    drawing.box(x + 25, 228, width - 50, 34, theme.causal, theme.causal, opacity=0.22)
    drawing.text(x + width / 2, 250, "causal adapter", theme.ink)


def tokens(drawing: Drawing, centre: float, y: float, words: Sequence[str], label: str) -> None:
    """A row of tokens around `centre`, with a bracket and a label below."""
    theme, width, pitch = drawing.theme, 62, 70
    left = centre - (len(words) * pitch - (pitch - width)) / 2
    for place, word in enumerate(words):
        drawing.box(left + place * pitch, y, width, 30, theme.panel, theme.faint)
        drawing.text(left + place * pitch + width / 2, y + 20, escape(word), theme.ink)
    drawing.elements.append(
        f'<path d="M {left:g} {y + 36:g} v 6 H {2 * centre - left:g} v -6" fill="none" stroke="{theme.faint}" '
        'stroke-width="1.5"/>'
    )
    drawing.text(centre, y + 60, label, theme.faint, 12)


def draw(theme: Theme) -> str:
    drawing = Drawing(theme)
    drawing.box(12, 36, WIDTH - 24, 260, theme.panel, theme.faint)
    drawing.text(28, 60, "every layer", theme.faint, 13, text_anchor="start")
    columns = {"causal": 30, "bidirectional": 244, "mixing": 478, "answer": 690}
    stream(drawing, columns["causal"], "causal stream", "causal adapter", theme.causal, causal=True)
    stream(
        drawing,
        columns["bidirectional"],
        "bidirectional stream",
        "bidirectional adapter",
        theme.bidirectional,
        causal=False,
    )
    mixing(drawing, columns["mixing"])
    answer(drawing, columns["answer"])

    # Keys and values go from both streams into the mixture, and from there to the answer.
    drawing.arrow("M 130 84 V 70 H 566 V 112", theme.causal)
    drawing.arrow("M 444 182 H 474", theme.bidirectional)
    drawing.arrow("M 654 182 H 686", theme.mixed)

    # The encoded prompt is read twice, the answer once.
    centre = 237
    words = [*PROMPT, *COMPLETION]
    tokens(drawing, centre, 338, words[:ENCODED], "encoded prompt: the prompt without its last token")
    tokens(drawing, 790, 338, words[ENCODED:], "last prompt token, and completion")
    drawing.arrow(f"M {centre - 6} 338 V 314 H 130 V 286", theme.causal)
    drawing.arrow(f"M {centre + 6} 338 V 314 H 344 V 286", theme.bidirectional)
    drawing.arrow("M 790 338 V 286", theme.causal)
    drawing.arrow("M 790 84 V 20", theme.causal)
    drawing.text(778, 22, "logits of “Mary” and “.”", theme.faint, 12, text_anchor="end")
    note = "One forward pass carries all three. After it, the cache holds the mixture, and decoding is ordinary."
    drawing.text(WIDTH / 2, 432, note, theme.faint)
    return drawing.svg()


def pictures() -> dict[str, str]:
    """The SVG of each theme, by file name."""
    return {f"method-{name}.svg": draw(theme) for name, theme in THEMES.items()}


if __name__ == "__main__":
    for name, svg in pictures().items():
        (FOLDER / name).write_text(svg, encoding="utf-8")
