"""The memory that a model takes at the least, compared with what the machine has before any is taken."""

from __future__ import annotations

import os
from argparse import Namespace

import torch
from fairseq.distributed.fully_sharded_data_parallel import has_FSDP

from ..moe import ExpertGroup
from .config import expert_class, expert_options, expert_sizes, experts_of, hidden_size, kept_layers, moe_layers, placed

_BYTES = 4  # of a parameter, which is built in 32 bits


def check_memory(cfg: Namespace, entries: int, group: ExpertGroup | None = None) -> None:
    """Refuses a model whose parameters alone are more than the machine's memory.

    Args:
        cfg: a checked configuration.
        entries: rows of the embeddings.
        group: the processes that share the experts; None: this one holds all.

    Raises:
        ValueError: says how much would be needed and how much there is.
    """
    if torch.empty(0).device.type == "meta" or has_FSDP:  # shapes only; or each layer is split when it is built
        return
    needed, there = _BYTES * least_parameters(cfg, entries, group), _memory()
    if needed > there:
        stack = "encoder" if cfg.encoder_layers else "decoder"
        raise ValueError(
            f"the model needs {needed / 2**30:,.1f} GiB for its parameters alone, this machine has "
            f"{there / 2**30:,.1f} GiB: choose smaller sizes, such as of --moe-num-experts {cfg.moe_num_experts}, "
            f"--{stack}-embed-dim {getattr(cfg, f'{stack}_embed_dim')} or --{stack}-layers "
            f"{getattr(cfg, f'{stack}_layers')}"
        )


def least_parameters(cfg: Namespace, entries: int, group: ExpertGroup | None) -> int:
    """Counts the matrices of a process: embeddings once, positions, attention, feed-forward networks and experts."""
    share = group.size if group else 1
    kind, options = expert_class(cfg), expert_options(cfg)
    total = entries * (cfg.encoder_embed_dim if cfg.encoder_layers else cfg.decoder_embed_dim)
    for stack, side in (("encoder", "source"), ("decoder", "target")):
        dim, hidden = getattr(cfg, f"{stack}_embed_dim"), getattr(cfg, f"{stack}_ffn_embed_dim")
        trained = getattr(cfg, f"{stack}_layers")
        kept = kept_layers(getattr(cfg, f"{stack}_layers_to_keep"), trained)
        with_experts = moe_layers(trained, cfg.moe_interval) if stack in placed(cfg) else []
        numbers = [experts_of(cfg, f"{stack}.{number + 1}") for number in kept if number + 1 in with_experts]
        layers, moe, held = len(kept), len(numbers), sum(-(-number // share) for number in numbers)
        total += getattr(cfg, f"max_{side}_positions") * dim + layers * 4 * dim**2 + (layers - moe) * 2 * dim * hidden
        sizes = expert_sizes(cfg, stack) if moe else None
        if sizes is None:
            matrices = held * kind.matrices(dim // cfg.moe_heads, hidden_size(cfg, stack), options)
        else:  # a process holds some of each size; the smallest ones are the least that it can hold
            matrices = moe * sum(kind.matrices(dim // cfg.moe_heads, size, options) for size in sizes[: held // moe])
        total += cfg.moe_stack * matrices
    return total


def _memory() -> int:
    """Bytes of main memory, if the system says it."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 2**63
