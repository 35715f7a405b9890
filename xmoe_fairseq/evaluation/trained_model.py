"""A trained model, loaded once for whatever is measured with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils

from ..errors import UserError
from ..moe import Router
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
        """Gives all threshold routers another threshold.

        Raises:
            UserError: the model has none, or the threshold is not in [0, 1].
        """
        routers = [module for module in self.model.modules() if isinstance(module, Router)]
        turned = [router for router in routers if router.dial == "threshold"]
        if not turned:
            raise UserError(
                f"{self.checkpoint} has no threshold to choose: {self._instead()}; use a model with --moe-router "
                "threshold"
            )
        for router in turned:
            try:
                router.turn(threshold)
            except ValueError as error:
                raise UserError(str(error)) from error

    def _instead(self) -> str:
        if not expert_sites(self.model):
            return "it is dense, without experts"
        return (
            f"its router is {self.model.cfg.moe_router}, which gives every token the experts that it was trained with"
        )


def binarised(data: Path) -> Path:
    """Finds the folder of binary files: ``bin`` in a folder made by ``xmoe prepare``, or the folder itself."""
    return data / "bin" if (data / "bin").is_dir() else data
