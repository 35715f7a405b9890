"""Which options are not tried, and why."""

from __future__ import annotations

import re

from .parsers import Option

# Options that are not tried, by a regular expression over "command group option", and why.
NOT_TRIED: dict[str, str] = {
    r"--(tpu|on-cpu-convert-precision)$": "TPUs",
    r"--user-dir$": "names the plugin itself: every try gives it",
    r"--(wandb-project|azureml-logging|aim-.*)$": "a service outside of this machine",
    r"--(use-plasma-view|plasma-path)$": "a server of shared memory (pyarrow's, which exists no more)",
    r"--model-parallel-size$": "Megatron, which fairseq does not bring",
    r"--(slowmo.*|localsgd.*|use-bmuf)$": "SlowMo (fairscale) and BMUF, for many GPUs",
    r"--pipeline-.*": "splits a model's layers over GPUs (fairscale)",
    r"--(zero-sharding|no-reshard-after-forward|fp32-reduce-scatter|cpu-offload|use-sharded-state"
    r"|not-fsdp-flatten-parameters)$": "fully sharded training (fairscale)",
    r"--(distributed-(world-size|num-procs|rank|backend|init-method|no-spawn)|device-id|nprocs-per-node"
    r"|ddp-comm-hook|fix-batches-to-gpus|find-unused-parameters|gradient-as-bucket-view|broadcast-buffers"
    r"|fast-stat-sync)$": "several processes: docs/parallel.md and tests/distributed",
    r"distributed_training ": "training's: a command that translates or measures reads none",
    r"--.*-mt$": "speech to speech in two passes",
    r"--(iter-decode-.*|retain-iter-history|decoding-format)$": "models that refine (non-autoregressive, Levenshtein)",
    r"--quantization-config-path$": "quantisation by products (docs of fairseq, quant_noise), which names modules",
    r"--.*-xformers-att-config$": "xformers, a package for GPUs",
    r"--offload-activations$": "moves activations from a GPU to the CPU",
    r"--(base-layers|base-sublayers|base-shuffle)$": "BASE layers of stock fairseq: here `--moe-router balanced`",
    r"--char-inputs$": "read by no transformer of stock fairseq",
    r"--(export|no-beamable-mm|no-seed-provided)$": "read by no command",
    r"optimizer (lamb|cpu_adam|composite) ": "apex and deepspeed, for GPUs, or groups that a model must name",
    r"bpe (fastbpe|gpt2|bert|hf_byte_bpe|subword_nmt|byte_bpe) ": "another package, or a download, not fairseq's",
    r"scoring bert_score ": "another package",
    r"fairseq-(generate|interactive|validate|eval-lm) checkpoint ": "training's: a command that translates reads none",
}
_TRIED = {re.compile(pattern): reason for pattern, reason in NOT_TRIED.items()}


def reason_not_tried(option: Option) -> str | None:
    """Returns why an option does not concern translation with this plugin, or None if it is tried."""
    name = f"{option.command} {option.group} {option.name}"
    if option.command == "fairseq-train" and option.group == "distributed_training":
        name = option.name
    return next((reason for pattern, reason in _TRIED.items() if pattern.search(name)), None)
