"""Numbers of stock fairseq's options that have no meaning, which fairseq takes until they fail or, worse, do not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..common.literals import literal
from ..errors import UserError

_INFINITY = math.inf
# Least and greatest value; of lists, of each.
RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**32 - 1),  # NumPy takes no others
    "num_workers": (0, 10**4),
    "lr": (0, 1e30),
    "update_freq": (1, 10**6),
    "max_update": (0, _INFINITY),
    "max_epoch": (0, _INFINITY),
    "warmup_updates": (0, _INFINITY),
    "clip_norm": (0, _INFINITY),
    "weight_decay": (0, _INFINITY),
    "label_smoothing": (0, 1),
    "dropout": (0, 1),
    "attention_dropout": (0, 1),
    "activation_dropout": (0, 1),
    "sampling_temperature": (1e-6, _INFINITY),
    "log_interval": (1, _INFINITY),
    "beam": (1, 10**6),
    "nbest": (1, 10**6),
    "lenpen": (-1000, 1000),
    "max_len_a": (0, _INFINITY),
    "max_len_b": (0, _INFINITY),
    "buffer_size": (0, _INFINITY),
    "sampling_topp": (-1, 1),
    "total_num_update": (1, _INFINITY),
    "lr_shrink": (0, 1),
    "lr_period_updates": (-1, _INFINITY),  # the default, -1, is up to --max-update
    "lr_decay_period": (1, _INFINITY),
    "lr_deacy_period": (1, _INFINITY),  # as stock fairseq spells it
    "warmup_init_lr": (-1, 1e30),
    "end_learning_rate": (0, 1e30),
    "save_interval": (1, _INFINITY),
    "save_interval_updates": (0, _INFINITY),
    "validate_interval": (1, _INFINITY),
    "validate_interval_updates": (0, _INFINITY),
    "validate_after_updates": (0, _INFINITY),
    "max_valid_steps": (0, _INFINITY),
    "stop_time_hours": (0, _INFINITY),
    "batch_size": (1, _INFINITY),
    "batch_size_valid": (1, _INFINITY),
    "required_batch_size_multiple": (1, 10**6),
    "required_seq_len_multiple": (1, 10**6),
    "data_buffer_size": (0, 10**9),
    "num_shards": (1, 10**9),
    "shard_id": (0, 10**9),
    "distributed_world_size": (1, 10**6),
    "fp16_init_scale": (1e-30, 1e30),
    "ema_decay": (0, 1),
    "ema_update_freq": (1, _INFINITY),
    "min_len": (0, _INFINITY),
    "prefix_size": (0, _INFINITY),
    "no_repeat_ngram_size": (0, _INFINITY),
    "sampling_topk": (-1, _INFINITY),
    "temperature": (1e-6, _INFINITY),
    "tokens_per_sample": (1, 10**9),
    "context_window": (0, 10**9),
    "softmax_batch": (1, _INFINITY),
    "workers": (1, 10**4),
}


_BETAS = ("adam_betas", "adamax_betas")


def check_numbers(options: Mapping[str, Any]) -> None:
    """Checks the options of a command or of a section of YAML, as far as they have a range; NaN is none of any.

    Raises:
        UserError: names the option, its value and what it may be.
    """
    for name in _BETAS:
        if isinstance(options.get(name), str):
            _check_betas(name, options[name])
    for name, given in options.items():
        for value in given if isinstance(given, (list, tuple)) else (given,):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            least, greatest = RANGES.get(name, (-_INFINITY, _INFINITY))
            if not least <= value <= greatest:  # NaN, too
                shown = value if abs(value) < 10**30 or isinstance(value, float) else "of so many digits"
                what = f"in [{least:g}, {greatest:.10g}]" if math.isfinite(greatest) else f"at least {least:g}"
                what = what if name in RANGES else "a number"
                raise UserError(f"--{name.replace('_', '-')} {shown} is out of range: it must be {what}")


def _check_betas(name: str, text: str) -> None:
    values = literal(text)
    pair = values if isinstance(values, (list, tuple)) and len(values) == 2 else ()
    if not pair or not all(isinstance(one, (int, float)) and 0 <= one < 1 for one in pair):
        flag = "--" + name.replace("_", "-")
        raise UserError(f"{flag} {text[:100]!r} is out of range: give two numbers in [0, 1), such as (0.9, 0.98)")
