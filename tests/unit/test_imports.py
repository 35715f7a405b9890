"""Parts of the package that load no fairseq, and the plugin in fairseq whatever a program imports first."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from helpers import ROOT

# Each in a process of its own, which starts with what fairseq imports.
ORDERS = {
    "light parts load no fairseq and patch nothing": """
        import xmoe_fairseq.errors, xmoe_fairseq.cli, xmoe_fairseq.moe
        import xmoe_fairseq.common.schema, xmoe_fairseq.data_prep.demo_corpus, xmoe_fairseq.metrics.corpus
        from xmoe_fairseq.moe import MoELayer
        assert not {"fairseq", "xmoe_fairseq.plugin"} & sys.modules.keys()
    """,
    "--user-dir after a light part": """
        import xmoe_fairseq.moe
        check_user_dir()
    """,
    "--user-dir alone": """
        check_user_dir()
    """,
    "--user-dir after fairseq and a light part": """
        import fairseq.tasks
        import xmoe_fairseq.moe
        check_user_dir()
    """,
    "a light part, then a command": """
        import xmoe_fairseq.moe
        from fairseq_cli.train import add_defaults
        import fairseq_cli.train
        assert add_defaults is fairseq_cli.train.add_defaults and add_defaults.xmoe_patches
        check_registered()
    """,
    "python -m of a part that needs fairseq": """
        import runpy, contextlib, io
        with contextlib.redirect_stdout(io.StringIO()) as said:
            runpy.run_module("xmoe_fairseq.patches", run_name="__main__")
        assert said.getvalue().startswith("# What the plugin changes")
        check_registered()
    """,
    "a command after the plugin": """
        import xmoe_fairseq.plugin
        assert "fairseq_cli.validate" not in sys.modules
        import fairseq_cli.validate, fairseq.benchmark
        from xmoe_fairseq.common.literals import literal
        assert fairseq_cli.validate.eval is fairseq.benchmark.eval is literal
        assert fairseq_cli.validate.__spec__.origin == fairseq_cli.validate.__file__
    """,
    "the package, then fairseq": """
        import xmoe_fairseq
        check_registered()
    """,
    "fairseq, then the package": """
        import fairseq.models
        import xmoe_fairseq
        check_registered()
    """,
    "a part that needs fairseq, alone": """
        from xmoe_fairseq.models.config import RouterConfig
        import xmoe_fairseq.models.config
        assert sys.modules["xmoe_fairseq.models.config"] is xmoe_fairseq.models.config
        assert xmoe_fairseq.models.config.__spec__.loader is xmoe_fairseq.models.config.__loader__
        assert RouterConfig is xmoe_fairseq.models.config.RouterConfig
        check_registered()
    """,
    "a part of a part, as an attribute": """
        import xmoe_fairseq
        assert xmoe_fairseq.models.model.MoETransformerModel
        try:
            xmoe_fairseq.no_such_part
        except AttributeError as error:
            assert "no_such_part" in str(error)
        check_registered()
    """,
}
START = """
import os, sys
import hydra.core.config_store, numpy, omegaconf, sacrebleu, torch, torch.utils.data

def check_registered():
    from fairseq import checkpoint_utils
    from fairseq.models import ARCH_MODEL_REGISTRY
    from fairseq.optim import OPTIMIZER_REGISTRY
    from fairseq.tasks import TASK_REGISTRY
    from fairseq.trainer import Trainer
    assert "xmoe_transformer_tiny" in ARCH_MODEL_REGISTRY and "moe_adam" in OPTIMIZER_REGISTRY
    assert "multilingual_local" in TASK_REGISTRY
    assert len(Trainer.load_checkpoint.xmoe_patches) == 3
    [finder] = [one for one in sys.meta_path if type(one).__name__ == "Watch"] or [None]
    assert not finder or finder.find_spec("fairseq.tasks", None) is None

def check_user_dir():
    from fairseq import options
    parser = options.get_training_parser()
    words = ["DATA", "--user-dir", "xmoe_fairseq", "--task", "multilingual_local", "--arch", "xmoe_transformer_tiny",
             "--moe-threshold", "0.5"]
    sys.argv = ["fairseq-train", *words]
    args = options.parse_args_and_arch(options.get_training_parser(), words)
    assert args.moe_threshold == 0.5
    check_registered()

def in_a_process(name, program):
    pid = os.fork()
    if pid == 0:
        try:
            exec(program, globals())
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(f"{name}: {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}", flush=True)
"""


@pytest.fixture(scope="module")
def endings() -> dict[str, str]:
    """Exit codes by order, with what was said."""
    orders = {name: textwrap.dedent(program) for name, program in ORDERS.items()}
    program = f"{START}\nfor name, program in {orders!r}.items():\n    in_a_process(name, program)\n"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    codes = dict(line.rsplit(": ", 1) for line in result.stdout.splitlines() if ": " in line)
    return {name: code if code == "0" else result.stderr for name, code in codes.items()}


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_of_imports(order: str, endings: dict[str, str]) -> None:
    assert endings[order] == "0"


def test_the_help_of_the_command_loads_neither_fairseq_nor_torch() -> None:
    program = (
        "import sys; from xmoe_fairseq.cli import main; main(['--help']); "
        "assert not {'fairseq', 'torch', 'numpy'} & sys.modules.keys(), sys.modules.keys()"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "xmoe COMMAND" in result.stdout


def test_light_parts_are_parts() -> None:
    folder = ROOT / "xmoe_fairseq"
    from xmoe_fairseq.imports import LIGHT

    assert all((folder / name).is_dir() or Path(folder / f"{name}.py").is_file() for name in LIGHT)
