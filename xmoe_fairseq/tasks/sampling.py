"""The weights with which directions are drawn, checked before fairseq takes them."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError

_EXAMPLE = '{"main:en-ca": 0.7, "main:ca-en": 0.3}'
_FEW = 4


def check_weights(args: Namespace, keys: Sequence[str]) -> None:
    """Checks ``--sampling-weights-from-file``, which goes before ``--sampling-weights``, or the latter.

    Args:
        args: of the task.
        keys: of the texts that are drawn from, such as ``main:en-ca``.

    Raises:
        UserError: the file cannot be read, or the weights are none of these texts.
    """
    if args.sampling_weights_from_file:
        option = f"--sampling-weights-from-file {args.sampling_weights_from_file}"
        weights = _read(Path(args.sampling_weights_from_file), option)
    elif args.sampling_weights:
        option, weights = "--sampling-weights", args.sampling_weights
    else:
        return
    if not isinstance(weights, dict):
        raise UserError(f"{option} is no dictionary of weights: write it as {_EXAMPLE}")
    if missing := [key for key in keys if key not in weights]:
        rest = f" and {len(missing) - _FEW} more" if len(missing) > _FEW else ""
        raise UserError(f"{option} has no weight of {', '.join(missing[:_FEW])}{rest}: every direction needs one")
    for key in keys:
        weight = weights[key]
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise UserError(f"{option}: the weight of {key} is {weight!r}: give a number, 0 or more")
    if not sum(weights[key] for key in keys):
        raise UserError(f"{option}: all weights are 0: give one that is more")


def _read(file: Path, option: str) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{option} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{option} is no JSON, which {_EXAMPLE} is: {error}") from error
