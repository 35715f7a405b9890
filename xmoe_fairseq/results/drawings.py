"""The figures of ``xmoe analyze`` and ``xmoe sweep``, as a page holds them."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

from ..common.files import is_there
from ..errors import UserError

# In the order in which they are shown, with what they show.
_CAPTIONS = {
    "directions": "Capacity by direction",
    "layers": "Capacity by layer",
    "distribution": "How many tokens take how many experts",
    "frequency": "Capacity by frequency of the token",
    "positions": "Capacity by place in the sentence",
    "extremes": "The tokens that take most and least",
    "flops": "Computation of the layers, and what is saved",
    "experts_by_language_encoder": "Which experts the encoder uses for which language",
    "experts_by_language_decoder": "Which experts the decoder uses for which language",
    "language_similarity_encoder": "How alike languages are in the encoder's experts",
    "language_similarity_decoder": "How alike languages are in the decoder's experts",
    "coselection": "Experts taken together",
    "sweep": "Quality against computation at other thresholds",
}
_TYPES = {"svg": "image/svg+xml", "png": "image/png"}


@dataclass(frozen=True)
class Drawing:
    """A picture with its caption; ``source`` is a ``data:`` URL that holds it."""

    caption: str
    source: str


def read_drawings(folder: Path) -> list[Drawing]:
    """Reads the figures in a folder of ``xmoe analyze`` or ``xmoe sweep``: of each the smaller of its SVG and its PNG.

    Raises:
        UserError: a figure cannot be read.
    """
    drawings = []
    for name, caption in _CAPTIONS.items():
        files = [path for ending in _TYPES if is_there(path := folder / f"{name}.{ending}")]
        if files:
            drawings.append(Drawing(caption, _data_url(min(files, key=lambda path: path.stat().st_size))))
    return drawings


def _data_url(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the figure {path}: {error.strerror}") from error
    return f"data:{_TYPES[path.suffix[1:]]};base64,{base64.b64encode(content).decode()}"
