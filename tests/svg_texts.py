"""Where the texts of an SVG lie, about: by the mean width of letters, as no browser is at hand."""

from __future__ import annotations

import re
from itertools import combinations
from xml.etree import ElementTree

SPACE = "{http://www.w3.org/2000/svg}"
LETTER = 0.54
"""Of a sans serif, in units of the font's size."""

Box = tuple[float, float, float, float]


def text_boxes(svg: str) -> list[tuple[str, Box]]:
    """Every text with left, top, right and bottom."""
    root = ElementTree.fromstring(svg)
    style = "".join(one.text or "" for one in root.iter(f"{SPACE}style"))
    found = re.search(r"svg \{ font: (\d+)px", style)
    usual = float(found.group(1)) if found else 13.0
    title = re.search(r"\.title \{ font-size: (\d+)px", style)
    boxes = []
    for one in root.iter(f"{SPACE}text"):
        size = float(one.get("font-size") or usual)
        if title and "title" in one.get("class", "").split():
            size = float(title.group(1))
        text = "".join(one.itertext())
        width, x, y = LETTER * size * len(text), float(one.get("x", 0)), float(one.get("y", 0))
        left = (
            x - {"start": 0.0, "middle": width / 2, "end": width}[one.get("text-anchor", "start")]
        )
        boxes.append((text, (left, y - 0.7 * size, left + width, y + 0.1 * size)))
    return boxes


def covered(svg: str) -> list[tuple[str, str]]:
    """Pairs of texts that lie on each other."""
    return [
        (one, other)
        for (one, a), (other, b) in combinations(text_boxes(svg), 2)
        if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
    ]


def outside(svg: str) -> list[str]:
    """Texts that leave the picture."""
    root = ElementTree.fromstring(svg)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    return [
        text
        for text, (left, top, right, bottom) in text_boxes(svg)
        if left < 0 or top < 0 or right > width or bottom > height
    ]
