"""Glyphs: ten drawn shapes, made in a second from a fixed seed, with a known typicality.

The paper is about data with a long tail: many examples that look alike, and a few that a model can
only memorize. Glyphs have that structure by construction. Most are small variations of their
class. About one in eight is drawn in a rare style (turned, slanted, inverted, very thin or thick,
broken) or is ambiguous: its strokes lie between those of its own class and of another class.
Typicality falls with the distance of the generating parameters from the class's own, 1 for a
perfect specimen; it takes the role of the C-score.

Every shape is a set of twelve straight segments, so that an image is a distance field (distance to
the nearest segment, thresholded at half the stroke width) and shapes can be mixed segment by
segment.
"""

from dataclasses import dataclass

import numpy as np
import torch

from data.random_streams import random_stream

GLYPH_NAMES = (
    "circle",
    "square",
    "triangle",
    "asterisk",
    "heart",
    "spiral",
    "arrow",
    "wave",
    "hourglass",
    "cross",
)
SYMMETRY = (360, 4, 3, 6, 1, 1, 1, 2, 2, 4)  # turns by 1/nth of a circle show the same again
SIZE = 20  # pixels
SEGMENTS = 12  # of every shape
RARE_SHARE = 0.125  # of all glyphs; a few of them are drawn so mildly that they stay typical
RARE_STYLES = ("turned", "slanted", "inverted", "thin or thick", "broken", "ambiguous")
RENDERED_AT_ONCE = 256  # images whose distances still fit into a CPU's cache


@dataclass(frozen=True)
class _Parameters:
    """Parameters of glyphs, one array entry per glyph (lengths are in half image widths)."""

    label: np.ndarray
    other: np.ndarray  # the class that it is mixed with
    mix: np.ndarray  # 0: its own class's strokes; 0.5: halfway to the other's
    angle: np.ndarray
    slant: np.ndarray
    scale: np.ndarray  # [n, 2], horizontal and vertical
    shift: np.ndarray  # [n, 2]
    width: np.ndarray  # of the stroke, as a multiple of the usual one
    broken: np.ndarray  # the share of segments that is left out
    kept: np.ndarray  # [n, SEGMENTS] bool
    paper: np.ndarray  # brightness behind the strokes
    ink: np.ndarray
    inverted: np.ndarray  # bool


def make_glyphs(n: int, purpose: str = "train") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make images uint8 [n, 1, 20, 20], labels int64 [n] and typicality float64 [n].

    Each purpose has its own endless stream of glyphs, and n only says where to stop: glyph i is
    the same whatever n is. Every ten successive glyphs show each class once.
    """
    parameters = _draw_parameters(n, purpose)
    images = _render(parameters)
    noise = random_stream(f"glyph pixels, {purpose}").standard_normal(images.shape, np.float32)
    images = np.clip(images + 0.06 * noise, 0, 1)
    return (
        torch.from_numpy((255 * images).round().astype(np.uint8)[:, None]),
        torch.from_numpy(parameters.label),
        torch.from_numpy(_typicality(parameters)),
    )


def _draw_parameters(n: int, purpose: str) -> _Parameters:
    """Draw the parameters row by row, so that the first rows do not depend on n."""
    tens = -(-n // len(GLYPH_NAMES))
    label = random_stream(f"glyph labels, {purpose}").random((tens, len(GLYPH_NAMES)))
    label = label.argsort(1).reshape(-1)[:n]
    normal = random_stream(f"glyph variation, {purpose}").standard_normal((n, 9))
    uniform = random_stream(f"glyph styles, {purpose}").random((n, 5 + SEGMENTS))

    rare = uniform[:, 0] < RARE_SHARE
    style = np.where(rare, (uniform[:, 1] * len(RARE_STYLES)).astype(int), -1)
    strength = uniform[:, 2]  # how far a rare style goes
    sign = np.where(uniform[:, 3] < 0.5, -1, 1)

    def rarely(which: str, mild: float, strong: float) -> np.ndarray:
        return np.where(style == RARE_STYLES.index(which), mild + (strong - mild) * strength, 0)

    # Twice as thick still shows the shape; thin can go further.
    weight = rarely("thin or thick", 0.6, 1.0) * np.where(sign > 0, 1.0, 1.4)
    broken = rarely("broken", 0.25, 0.55)
    return _Parameters(
        label=label,
        other=(label + 1 + (uniform[:, 4] * (len(GLYPH_NAMES) - 1)).astype(int)) % len(GLYPH_NAMES),
        mix=rarely("ambiguous", 0.25, 0.48),
        angle=0.12 * normal[:, 0] + sign * rarely("turned", 0.6, 2.8),
        slant=0.08 * normal[:, 1] + sign * rarely("slanted", 0.45, 1.1),
        scale=np.exp(0.08 * normal[:, 2:4]),
        shift=0.07 * normal[:, 4:6],
        width=np.exp(0.13 * normal[:, 6] + sign * weight),
        broken=broken,
        kept=uniform[:, 5:] >= broken[:, None],
        paper=np.clip(0.12 + 0.05 * normal[:, 7], 0, 0.3),
        ink=np.clip(0.85 + 0.08 * normal[:, 8], 0.6, 1),
        inverted=style == RARE_STYLES.index("inverted"),
    )


def _typicality(p: _Parameters) -> np.ndarray:
    """Return 1 / (1 + strangeness): squared distances, each in the unit that halves typicality."""
    period = 2 * np.pi / np.array(SYMMETRY)[p.label]
    angle = (p.angle + period / 2) % period - period / 2  # a square turned by 90 degrees is itself
    strangeness = (
        (angle / 0.55) ** 2
        + (p.slant / 0.5) ** 2
        + (np.log(p.width) / 0.6) ** 2
        + ((np.log(p.scale) / 0.5) ** 2).sum(1)
        + ((p.shift / 0.5) ** 2).sum(1)
        + (p.mix / 0.3) ** 2
        + (p.broken / 0.3) ** 2
        + 1.5 * p.inverted
    )
    return 1 / (1 + strangeness)


def _render(p: _Parameters) -> np.ndarray:
    """Render the brightness in [0, 1] of every pixel, [n, SIZE, SIZE]."""
    shapes = _shapes()
    mix = p.mix[:, None, None, None]
    segments = (1 - mix) * shapes[p.label] + mix * shapes[p.other]
    segments = _place(segments, p).astype(np.float32)
    pixel = 2 / SIZE
    half_width = 0.105 * p.width
    # A stroke thinner than a pixel is drawn a pixel wide and paler.
    opacity = np.minimum(1, 2 * half_width / pixel)
    half_width = np.maximum(half_width, pixel / 2)
    images = np.empty((len(segments), SIZE * SIZE), np.float32)  # 1 on a stroke, 0 beside it
    for start in range(0, len(segments), RENDERED_AT_ONCE):
        rows = slice(start, start + RENDERED_AT_ONCE)
        distance = _distance(segments[rows], p.kept[rows])
        images[rows] = np.clip((half_width[rows, None] - distance) / pixel + 0.5, 0, 1)
    front, back = np.where(p.inverted, (p.paper, p.ink), (p.ink, p.paper))
    contrast = (front - back) * opacity
    return (back[:, None] + contrast[:, None] * images).reshape(-1, SIZE, SIZE)


def _place(segments: np.ndarray, p: _Parameters) -> np.ndarray:
    """Scale, slant, turn and shift the segments of each glyph; float [n, SEGMENTS, 2 ends, 2]."""
    x = segments[..., 0] * p.scale[:, 0, None, None]
    y = segments[..., 1] * p.scale[:, 1, None, None]
    x = x - p.slant[:, None, None] * y
    cos, sin = np.cos(p.angle)[:, None, None], np.sin(p.angle)[:, None, None]
    turned = np.stack([cos * x - sin * y, sin * x + cos * y], -1)
    return turned + p.shift[:, None, None, :]


def _distance(segments: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Return each pixel centre's distance to the nearest kept segment, [n, SIZE * SIZE]."""
    centre = (np.arange(SIZE, dtype=np.float32) + 0.5) * (2 / SIZE) - 1
    y, x = (axis.reshape(1, -1) for axis in np.meshgrid(centre, centre, indexing="ij"))
    nearest = np.full((len(segments), SIZE * SIZE), np.inf, np.float32)
    for k in range(SEGMENTS):
        (ax, ay), (bx, by) = np.moveaxis(segments[:, k], 0, -1)[..., None]
        dx, dy = bx - ax, by - ay
        length2 = np.maximum(dx * dx + dy * dy, np.float32(1e-9))
        px, py = x - ax, y - ay
        along = np.clip((px * dx + py * dy) / length2, 0, 1)
        squared = (px - along * dx) ** 2 + (py - along * dy) ** 2
        squared[~kept[:, k]] = np.inf
        np.minimum(nearest, squared, out=nearest)
    return np.sqrt(nearest)


def _shapes() -> np.ndarray:
    """Return the ten classes' strokes [10, SEGMENTS, 2 ends, (x, y)], y down, within 0.7."""
    unwind = np.linspace(0, 1, SEGMENTS + 1)
    turn = 2 * np.pi * unwind
    radius = 0.08 + 0.62 * unwind
    heart_x = 0.7 * np.sin(turn) ** 3
    heart_y = -0.045 * (
        13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
    )
    spokes = [[(0, 0), (0.7 * np.sin(a), -0.7 * np.cos(a))] for a in turn[:-1:2]]
    strokes = {
        "circle": [np.stack([0.62 * np.sin(turn), -0.62 * np.cos(turn)], 1)],
        "square": [[(-0.58, -0.58), (0.58, -0.58), (0.58, 0.58), (-0.58, 0.58), (-0.58, -0.58)]],
        "triangle": [[(0, -0.62), (0.68, 0.55), (-0.68, 0.55), (0, -0.62)]],
        "asterisk": spokes,
        "heart": [np.stack([heart_x, heart_y], 1)],
        "spiral": [np.stack([radius * np.sin(1.75 * turn), -radius * np.cos(1.75 * turn)], 1)],
        "arrow": [[(0, 0.68), (0, -0.68)], [(-0.48, -0.2), (0, -0.68), (0.48, -0.2)]],
        "wave": [np.stack([1.4 * unwind - 0.7, -0.4 * np.sin(1.5 * turn)], 1)],
        "hourglass": [[(-0.5, -0.62), (0.5, -0.62), (-0.5, 0.62), (0.5, 0.62), (-0.5, -0.62)]],
        "cross": [[(-0.55, -0.55), (0.55, 0.55)], [(0.55, -0.55), (-0.55, 0.55)]],
    }
    return np.stack([_segments(strokes[name]) for name in GLYPH_NAMES])


def _segments(strokes: list) -> np.ndarray:
    """Cut every edge into equal parts: polylines to segments [SEGMENTS, 2, 2]."""
    edges = np.concatenate([np.stack([s[:-1], s[1:]], 1) for s in map(np.asarray, strokes)])
    parts = SEGMENTS // len(edges)
    cuts = np.linspace(0, 1, parts + 1)[:, None]
    points = edges[:, :1] * (1 - cuts) + edges[:, 1:] * cuts  # [edges, parts + 1, 2]
    return np.stack([points[:, :-1], points[:, 1:]], 2).reshape(SEGMENTS, 2, 2)
