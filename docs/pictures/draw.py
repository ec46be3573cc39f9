"""Draw the pictures of the documentation: `python docs/pictures/draw.py [FOLDER]`."""

from __future__ import annotations

import sys
from pathlib import Path

LAYERS, HEADS = 6, 12
INK, LINE, PALE, KEPT = "#37474f", "#90a4ae", "#eceff1", "#3949ab"


def svg(width: int, height: int, title: str, *parts: str) -> str:
    """Return a document with a white ground, which reads in a dark theme too."""
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'font-family="sans-serif" font-size="13" fill="{INK}" role="img">',
            f"<title>{title}</title>",
            f'<rect width="{width}" height="{height}" rx="8" fill="white"/>',
            *parts,
            "</svg>\n",
        )
    )


def words(x: float, y: float, text: str, anchor: str = "middle", size: int = 13) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}">{text}</text>'


def box(x: float, y: float, width: float, height: float, *lines: str, fill: str = PALE) -> str:
    shape = (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" '
        f'fill="{fill}" stroke="{LINE}"/>'
    )
    top = y + height / 2 + 5 - 9 * (len(lines) - 1)
    return shape + "".join(
        words(x + width / 2, top + 18 * place, line) for place, line in enumerate(lines)
    )


def arrow(x: float, y: float, to_x: float, to_y: float, label: str = "") -> str:
    line = (
        f'<path d="M{x:g} {y:g} L{to_x:g} {to_y:g}" stroke="{INK}" stroke-width="1.5" '
        'marker-end="url(#tip)"/>'
    )
    return line + (words((x + to_x) / 2, (y + to_y) / 2 - 6, label, size=11) if label else "")


TIP = (
    '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
    f'orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{INK}"/></marker></defs>'
)


def way() -> str:
    """Draw the path of a text through the steps of its chain."""
    return svg(
        760, 176, "The path of a text",
        TIP,
        box(14, 56, 62, 56, "text"),
        arrow(76, 84, 112, 84),
        box(112, 56, 132, 56, "step 0", "TF-IDF, linear"),
        arrow(244, 84, 318, 84, "uncertain"),
        box(318, 56, 112, 56, "f_o", "picks a step"),
        arrow(430, 84, 484, 84, "step k"),
        box(484, 56, 132, 56, "compact pass", "heads of step k"),
        arrow(616, 84, 686, 84, "confident"),
        box(686, 56, 62, 56, "answer"),
        f'<path d="M178 112 L178 152 L717 152 L717 114" fill="none" stroke="{INK}" '
        'stroke-width="1.5" marker-end="url(#tip)"/>',
        words(448, 145, "confident, without the encoder", size=11),
        f'<path d="M585 56 C585 22 515 22 515 54" fill="none" stroke="{INK}" stroke-width="1.5" '
        'marker-end="url(#tip)"/>',
        words(550, 22, "uncertain: next step of the chain", size=11),
    )  # fmt: skip


def ladder() -> str:
    """Draw which heads three steps of the uniform ladder compute."""
    size, gap = 13, 3
    panel = HEADS * (size + gap)
    parts = []
    for place, step in enumerate((1, 2, 12)):
        left = 70 + place * (panel + 34)
        share = step / HEADS
        label = f"step {step}: {share:.0%} of the heads"
        parts.append(words(left + panel / 2, 24, label))
        for layer in range(LAYERS):
            for head in range(HEADS):
                x, y = left + head * (size + gap), 36 + layer * (size + gap)
                fill = KEPT if head < step else PALE
                parts.append(
                    f'<rect x="{x}" y="{y}" width="{size}" height="{size}" rx="2" fill="{fill}"/>'
                )
    rows = [words(60, 47 + layer * 16, f"layer {layer + 1}", "end", 11) for layer in range(LAYERS)]
    return svg(760, 146, "Heads that three steps of a uniform ladder compute", *rows, *parts)


def packing() -> str:
    """Draw a batch with padding and the same batch packed."""
    lengths = (14, 5, 9, 3)
    size, gap = 14, 3
    parts = [words(16, 26, "padded: every text as long as the longest", "start")]
    for row, length in enumerate(lengths):
        for token in range(max(lengths)):
            fill = KEPT if token < length else PALE
            parts.append(
                f'<rect x="{16 + token * (size + gap)}" y="{38 + row * (size + gap)}" '
                f'width="{size}" height="{size}" rx="2" fill="{fill}"/>'
            )
    parts.append(words(300, 26, "packed: tokens of all texts, one after another", "start"))
    shades = (KEPT, "#7986cb", "#303f9f", "#9fa8da")
    place = 0
    for length, shade in zip(lengths, shades, strict=True):
        for _ in range(length):
            x, y = 300 + place % 26 * (size + gap), 38 + place // 26 * (size + gap)
            parts.append(
                f'<rect x="{x}" y="{y}" width="{size}" height="{size}" rx="2" fill="{shade}"/>'
            )
            place += 1
    total, padded = sum(lengths), len(lengths) * max(lengths)
    parts.append(words(300, 98, f"{total} tokens computed instead of {padded}", "start"))
    return svg(760, 116, "A batch, padded and packed", *parts)


PICTURES = {"way": way, "ladder": ladder, "packing": packing}


def main() -> None:
    """Write every picture."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for name, draw in PICTURES.items():
        (folder / f"{name}.svg").write_text(draw())


if __name__ == "__main__":
    main()
