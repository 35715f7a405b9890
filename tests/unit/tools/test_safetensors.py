"""Files of tensors: what is mapped, and given back."""

from __future__ import annotations

from pathlib import Path

import torch

from xmoe_fairseq.conversion import safetensors


def resident(path: Path) -> int:
    """Returns how many KiB of a mapped file are in memory."""
    _, found, after = Path("/proc/self/smaps").read_text().partition(f"{path}\n")
    return int(after.partition("Rss:")[2].split()[0]) if found else 0


def test_bytes_that_were_used_are_given_back(tmp_path: Path) -> None:
    numbers, path = torch.arange(2**20, dtype=torch.float32), tmp_path / "model.safetensors"
    with path.open("wb") as file:
        safetensors.write({"x": numbers}, file)
    read = safetensors.read(path)
    for _ in range(2):
        assert torch.equal(read.tensors["x"], numbers)
        assert resident(path) >= 4096
        read.forget()
        assert resident(path) == 0
