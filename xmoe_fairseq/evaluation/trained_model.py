"""A trained model, loaded once for whatever is measured with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils

from ..errors import UserError
from ..moe import ROUTERS, Router
from ..moe.flops import expert_sites


@dataclass(frozen=True)
class TrainedModel:
    """A model in evaluation, on the GPU if there is one.

    Attributes:
        checkpoint: the file it was loaded from.
        model: of any architecture.
        cfg: fairseq's configuration of its training.
        task: of the checkpoint, with the data that it is evaluated on.
    """

    checkpoint: Path
    model: Any
    cfg: Any
    task: Any

    @classmethod
    def load(cls, checkpoint: Path, data: Path, pairs: Sequence[str] = (), fp16: bool = False) -> TrainedModel:
        """Loads a model and its task; files are checked first.

        Args:
            checkpoint: as written by ``fairseq-train``.
            data: the folder made by ``xmoe prepare``, or its ``bin``.
            pairs: directions, such as ``en-de``; none for those of the checkpoint's task.
            fp16: computes in half precision.

        Raises:
            UserError: a file is missing or refused, or the data lack a direction.
        """
        if not checkpoint.is_file():
            raise UserError(f"there is no checkpoint {checkpoint}: check the name")
        if not data.is_dir():
            raise UserError(f"there is no data folder {data}: give the folder made by data_prep/prepare.sh")
        # Only options that the checkpoint's task has are replaced; --valid-lines is for validation while training.
        given: dict[str, Any] = {"data": str(binarised(data)), "valid_lines": 0}
        if pairs:
            given["lang_pairs"] = ",".join(pairs)
        models, cfg, task = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)], arg_overrides=given)
        model = models[0].eval()
        if fp16:
            model.half()
        return cls(checkpoint, model.to("cuda" if torch.cuda.is_available() else "cpu"), cfg, task)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        device: torch.device = next(self.model.parameters()).device
        return device

    def set_threshold(self, threshold: float) -> None:
        """Gives all threshold routers another threshold; see `turn`."""
        self.turn("threshold", threshold)

    def turn(self, dial: str, value: float) -> None:
        """Gives all routers another value of the option that trades quality for computation.

        Args:
            dial: ``threshold`` or ``shift``, of `Router.dial`.
            value: of it.

        Raises:
            UserError: the model has no such option, or the value is out of range.
        """
        routers = [module for module in self.model.modules() if isinstance(module, Router)]
        turned = [router for router in routers if router.dial == dial]
        if not turned:
            known = " or ".join(name for name, router in ROUTERS.items() if router.dial == dial)
            raise UserError(
                f"{self.checkpoint} has no {dial} to choose: {self._instead(routers)}; use a model with --moe-router "
                f"{known}"
            )
        for router in turned:
            try:
                router.turn(value)
            except ValueError as error:
                raise UserError(str(error)) from error

    def _instead(self, routers: Sequence[Router]) -> str:
        if not expert_sites(self.model):
            return "it is dense, without experts"
        kind = f"its router is {self.model.cfg.moe_router}, which"
        if routers and routers[0].dial:
            return (
                f"{kind} has a {routers[0].dial} (xmoe sweep --{routers[0].dial}s, xmoe score --moe-{routers[0].dial})"
            )
        return f"{kind} gives every token the experts that it was trained with"


def binarised(data: Path) -> Path:
    """Finds the folder of binary files: ``bin`` in a folder made by ``xmoe prepare``, or the folder itself."""
    return data / "bin" if (data / "bin").is_dir() else data
