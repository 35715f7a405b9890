"""Which checkpoint is the best: the metric that decides, how many are kept, when training stops for it."""

from __future__ import annotations

import logging
from typing import Any

from ..errors import UserError

logger = logging.getLogger(__name__)

# Every criterion of fairseq gives the first, and fairseq itself the second.
_ALWAYS = ("loss", "num_updates")
# What is better the larger it is, by the beginning of its name.
_LARGER_IS_BETTER = ("bleu", "chrf", "accuracy")
# Where a checkpoint keeps it, beside what fairseq keeps of its iterators and meters.
_KEY = "xmoe_selection"


def check_metric(trainer: Any) -> None:
    """Refuses a ``--best-checkpoint-metric`` that validation does not give; fairseq ends when it first validates.

    What is not known by name is looked for by validating: batches until one gives the metric, and all of them else.

    Raises:
        UserError: lists what validation gives.
    """
    metric, task = trainer.cfg.checkpoint.best_checkpoint_metric, trainer.task
    # With this hook, a task may add values that are not known before.
    if trainer.cfg.dataset.disable_validation or metric in _ALWAYS or hasattr(task, "post_validate"):
        return
    if metric.startswith(_LARGER_IS_BETTER) and not trainer.cfg.checkpoint.maximize_best_checkpoint_metric:
        logger.warning(
            f"--best-checkpoint-metric {metric} without --maximize-best-checkpoint-metric: the best checkpoint is the "
            f"one whose {metric} is least"
        )
    names = set(translation_metrics(task))
    for subset in trainer.cfg.dataset.valid_subset.split(","):
        if metric not in names:
            found = names | _validated(trainer, subset, metric)
            if metric not in found:
                raise UserError(_unknown(metric, sorted(found), task))


def translation_metrics(task: Any) -> tuple[str, ...]:
    """Names what validation gives if it translates."""
    if hasattr(task, "translation_metrics"):
        names: tuple[str, ...] = task.translation_metrics
        return names
    return ("bleu",) if getattr(getattr(task, "cfg", None), "eval_bleu", False) else ()


def _validated(trainer: Any, subset: str, metric: str) -> set[str]:
    """Names what validation gives of a subset; it ends where the metric is found."""
    from fairseq.logging import metrics

    most = trainer.cfg.dataset.max_valid_steps
    batches = trainer.get_valid_iterator(subset).next_epoch_itr(shuffle=False, set_dataset_epoch=False)
    with metrics.aggregate(new_root=True) as shown:
        for number, sample in enumerate(batches):
            if most is not None and number > most:
                break
            trainer.valid_step(sample)
            if metric in shown.get_smoothed_values():
                break
    return set(shown.get_smoothed_values())


def _unknown(metric: str, names: list[str], task: Any) -> str:
    translates = hasattr(task, "translation_metrics") or hasattr(getattr(task, "cfg", None), "eval_bleu")
    advice = " (bleu comes with --eval-bleu)" if translates and "bleu" not in names else ""
    shown = names if len(names) <= 40 else [name for name in names if "_" not in name] + ["..."]
    return f"--best-checkpoint-metric {metric} is not given by validation: choose from {', '.join(shown)}{advice}"


def note(saved: dict[str, Any], trainer: Any) -> None:
    """Keeps in a checkpoint by which metric the best one is chosen, and what ``--patience`` has counted.

    Args:
        saved: the checkpoint, changed in place.
        trainer: fairseq's, which saves it.
    """
    early_stop = _early_stop()
    best = getattr(early_stop, "best", None)
    runs = getattr(early_stop, "num_runs", 0)
    counted = {} if best is None else {"best": float(best), "runs": int(runs)}
    saved["extra_state"][_KEY] = {"metric": trainer.cfg.checkpoint.best_checkpoint_metric, **counted}


def restore(cfg: Any, extra_state: Any) -> None:
    """Goes on with what the checkpoint kept; values of another metric are not compared with those to come.

    Args:
        cfg: the options of checkpoints.
        extra_state: of the checkpoint that was read; None if there was none.
    """
    from fairseq import checkpoint_utils

    kept = (extra_state or {}).get(_KEY)
    # fairseq has set it if the run goes on, and not if it is tuned or its counts are reset.
    if not isinstance(kept, dict) or getattr(checkpoint_utils.save_checkpoint, "best", None) is None:
        return
    if kept.get("metric") != cfg.best_checkpoint_metric:
        logger.warning(
            f"the best checkpoint was chosen by {kept.get('metric')} before and is chosen by "
            f"{cfg.best_checkpoint_metric} now: the first validation to come gives the first best one"
        )
        del checkpoint_utils.save_checkpoint.best
    elif isinstance(kept.get("best"), float) and isinstance(kept.get("runs"), int):
        early_stop = _early_stop()
        early_stop.best, early_stop.num_runs = kept["best"], kept["runs"]


def _early_stop() -> Any:
    """Returns the function on which fairseq keeps what ``--patience`` counts."""
    from fairseq_cli import train

    return train.should_stop_early
