"""`xmoe info`: parameters and FLOPs by hand, against real models and against PyTorch's own counter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq.modules import MultiheadAttention
from helpers import ROOT, build
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from xmoe_fairseq import cli
from xmoe_fairseq.commands import info
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.evaluation import model_costs
from xmoe_fairseq.models.architectures import architectures, build_on_meta, catalogue
from xmoe_fairseq.models.presets import PRESETS
from xmoe_fairseq.moe import EXPERTS, ROUTERS, StratifiedMoE
from xmoe_fairseq.moe.flops import count_flops, count_parameters, expert_sites
from xmoe_fairseq.results.usage import LayerUsage

SHARED = "--share-all-embeddings"
# Xu et al. 2023, tables 1 and 2: parameters in millions, and the hand count of the same model.
PUBLISHED_PARAMETERS = {
    "moe_transformer_m4_dense": (60, 60.5),
    "moe_transformer_m4": (148, 148.7),
    "moe_transformer_m4_cmr": (161, 161.3),
    "smoe_transformer_m4_4_4": (148, 148.7),
    "moe_transformer_m15_dense": (209, 209.1),
    "moe_transformer_m15": (963, 964.7),
    "moe_transformer_m15_cmr": (1010, 1015),
    "moe_transformer_m15_e32": (1770, 1770.5),
    "smoe_transformer_m15_4_4_4_4": (963, 964.7),
}
# The same tables: FLOPs per token in millions; for SMoE, those and the experts per token that they mean.
M4_FLOPS = {"_dense": 167, "": 192, "_switch": 167, "_eom": 192, "_cmr": 217, "_stack_2x4": 242}
M15_FLOPS = {"_dense": 506, "": 606, "_switch": 506, "_eom": 606, "_cmr": 707, "_e32": 606}
PUBLISHED_FLOPS = {f"moe_transformer_m4{row}": flops for row, flops in M4_FLOPS.items()} | {
    f"moe_transformer_m15{row}": flops for row, flops in M15_FLOPS.items()
}
MEASURED_FLOPS = {
    "smoe_transformer_m4_4_4": (3.0, 217),
    "smoe_transformer_m4_2_2_2_2": (4.2, 247),
    "smoe_transformer_m15_4_12": (2.5, 656),
    "smoe_transformer_m15_12_4": (3.5, 757),
    "smoe_transformer_m15_8_8": (3.0, 707),
    "smoe_transformer_m15_4_4_8": (3.2, 724),
    "smoe_transformer_m15_8_4_4": (4.0, 805),
    "smoe_transformer_m15_4_4_4_4": (4.2, 825),
}


def ask(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    cli.main(["info", *words, "--json"])
    return json.loads(capsys.readouterr().out)


def of_arch(capsys: pytest.CaptureFixture[str], arch: str, *words: str, vocab: int = 32000) -> dict[str, Any]:
    return ask(capsys, "--arch", arch, "--vocab", str(vocab), *words)


def hand_count(d: int, vocab: int, layers: int, moe: int, experts: int, cmr: bool = False) -> int:
    """Parameters of a pre-norm Transformer with feed-forward size 4 d and MoE layers with a router each."""
    attention = 4 * (d * d + d)
    feed_forward = (d * 4 * d + 4 * d) + (4 * d * d + d)
    norm = 2 * d
    encoder = layers * (attention + 2 * norm) + norm
    decoder = layers * (2 * attention + 3 * norm) + norm
    in_moe = experts * feed_forward + experts * d + cmr * (feed_forward + d + 1)
    return vocab * d + encoder + decoder + (2 * layers - moe) * feed_forward + moe * in_moe


# --- parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", PUBLISHED_PARAMETERS)
def test_published_parameters(arch: str, capsys: pytest.CaptureFixture[str]) -> None:
    published, by_hand = PUBLISHED_PARAMETERS[arch]
    total = of_arch(capsys, arch)["parameters"]["total"] / 1e6
    assert total == pytest.approx(by_hand, rel=0.003)
    assert total == pytest.approx(published, rel=0.01)  # the paper cuts digits off


@pytest.mark.parametrize(
    ("arch", "d", "moe", "experts", "cmr"),
    [
        ("moe_transformer_m4_dense", 512, 0, 0, False),
        ("moe_transformer_m4", 512, 6, 8, False),
        ("moe_transformer_m4_cmr", 512, 6, 8, True),
        ("moe_transformer_m15_e32", 1024, 6, 32, False),
    ],
)
def test_parameters_by_hand(
    arch: str, d: int, moe: int, experts: int, cmr: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    counted = of_arch(capsys, arch)["parameters"]
    feed_forward = 8 * d * d + 5 * d
    assert counted["total"] == hand_count(d, 32000, 6, moe, experts, cmr)
    assert counted["expert"] == moe * experts * feed_forward
    assert counted["active"] == counted["total"] - moe * (experts - 2) * feed_forward


@pytest.mark.parametrize("arch", ["transformer_tiny", *(name for name in PRESETS if name.endswith("_tiny"))])
@pytest.mark.parametrize("shared", [(SHARED,), ()])
def test_the_model_is_the_one_that_fairseq_builds(arch: str, shared: tuple[str, ...], toy_data: Path) -> None:
    built = build(toy_data, "--arch", arch, *shared)
    on_meta = build_on_meta(arch, len(built.task.source_dictionary), shared)
    assert {parameter.device.type for parameter in on_meta.parameters()} == {"meta"}
    real = {name: parameter.shape for name, parameter in built.model.named_parameters()}
    assert {name: parameter.shape for name, parameter in on_meta.named_parameters()} == real
    everything = {site.name: float(site.num_experts) for site in expert_sites(built.model)}
    counted = count_parameters(built.model, everything)
    assert counted.total == counted.active == sum(parameter.numel() for parameter in built.model.parameters())


def test_separate_embeddings_are_counted_apart(capsys: pytest.CaptureFixture[str]) -> None:
    together = of_arch(capsys, "transformer_tiny", vocab=1000)["parameters"]["total"]
    apart = of_arch(capsys, "transformer_tiny", "--separate-embeddings", vocab=1000)["parameters"]["total"]
    assert apart - together == 2 * 1000 * 64


def test_the_largest_model_takes_no_memory() -> None:
    # Not getrusage: its peak of a new program is at least what the program that started it took.
    script = (
        "from pathlib import Path\n"
        "from xmoe_fairseq.cli import main\n"
        "main('info --arch moe_transformer_m15_e32 --vocab 32000 --json'.split())\n"
        "peak = int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]) / 2**20\n"
        "assert peak < 1.5, f'{peak} GiB'\n"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["parameters"]["total"] > 1.7e9  # and nothing but JSON
    assert result.stderr == ""


# --- FLOPs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ("transformer_tiny",),
        ("xmoe_transformer_tiny", "--moe-threshold", "0.5"),
        ("xmoe_transformer_tiny", "--moe-router", "topk", "--moe-top-k", "3", "--moe-interval", "1"),
        ("moe_transformer_tiny", "--moe-regularizer", "cmr"),
        ("moe_transformer_tiny", "--moe-stack", "2", "--moe-placement", "decoder"),
        ("smoe_transformer_tiny",),
        ("moe_transformer_tiny", "--moe-expert", "glu", "--moe-expert-sizes", "hybrid", "--moe-stack", "2"),
    ],
    ids=" ".join,
)
def test_flops_are_those_that_pytorch_counts(words: tuple[str, ...], toy_data: Path) -> None:
    built = build(toy_data, "--arch", *words, SHARED)
    model, length, sentences = built.model.eval(), 7, 3
    tokens = torch.randint(4, len(built.task.source_dictionary), (sentences, length))
    # The counter does not know the CPU kernel of fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        _, extra = model(tokens, torch.full((sentences,), length), tokens)
    stats = [one for side in extra.get("routing", {}).values() for one in side]
    usage = [
        LayerUsage(one.layer, int(one.tokens), 0, int(one.received), 0, 0.0, tuple(one.expert_load.tolist()), (), 0)
        for one in stats
    ]
    widths = [module.embed_dim for module in model.modules() if isinstance(module, MultiheadAttention)]
    taken = model_costs.measured(model, usage)
    flops = count_flops(model, taken, model.decoder.output_projection, widths, length)
    # fairseq multiplies what the causal mask hides as well: twice the attention term.
    # A whole number, in floating-point steps: experts per token are a fraction.
    expected = round(sentences * length * (flops.total + flops.attention))
    # A token that skips strata skips their routers, whose products are all counted.
    strata = [module for module in model.modules() if isinstance(module, StratifiedMoE)]
    skipped = sum(2 * router.weight.numel() for module in strata for router in list(module.routers)[1:])
    assert expected - sentences * length * skipped <= counter.get_total_flops() <= expected


def as_the_paper_counts(counted: dict[str, Any], d: int) -> float:
    """Kaplan's formula for a decoder of 12 layers with a context of 1024, in millions; see docs/parameters.md."""
    without_attention = counted["flops_per_token"] - counted["flops"]["attention"]
    return (without_attention + 2 * 32000 * d + 2 * 12 * 1024 * d) / 1e6


@pytest.mark.parametrize("arch", PUBLISHED_FLOPS)
def test_published_flops(arch: str, capsys: pytest.CaptureFixture[str]) -> None:
    counted = of_arch(capsys, arch)
    assert as_the_paper_counts(counted, 512 if "m4" in arch else 1024) == pytest.approx(PUBLISHED_FLOPS[arch], rel=0.01)


@pytest.mark.parametrize("arch", MEASURED_FLOPS)
def test_published_flops_of_stratified_models(arch: str, capsys: pytest.CaptureFixture[str]) -> None:
    experts, published = MEASURED_FLOPS[arch]
    counted = of_arch(capsys, arch, "--experts-per-token", str(experts))
    assert as_the_paper_counts(counted, 512 if "m4" in arch else 1024) == pytest.approx(published, rel=0.01)
    low, high = counted["flops_range"]
    assert low < counted["flops_per_token"] < high


@pytest.mark.parametrize(("size", "published"), [("m4", M4_FLOPS), ("m15", M15_FLOPS)])
def test_rows_of_a_table_differ_by_whole_experts(
    size: str, published: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    ours = {row: of_arch(capsys, f"moe_transformer_{size}{row}")["flops_per_token"] / 1e6 for row in published}
    for row in published:
        assert ours[row] - ours["_dense"] == pytest.approx(published[row] - published["_dense"], abs=1.1)


# --- experts per token
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "words", "bounds"),
    [
        ("xmoe_transformer_tiny", (), (1, 8)),
        ("xmoe_transformer_tiny", ("--moe-threshold", "0"), (1, 1)),
        ("xmoe_transformer_tiny", ("--moe-threshold", "1"), (8, 8)),
        ("xmoe_transformer_tiny", ("--moe-router", "topk", "--moe-top-k", "3"), (3, 3)),
        ("moe_transformer_tiny", (), (2, 2)),
        ("moe_transformer_tiny", ("--moe-router", "switch"), (1, 1)),
        ("moe_transformer_tiny", ("--moe-router", "hash"), (1, 1)),
        ("moe_transformer_tiny", ("--moe-router", "balanced"), (1, 1)),
        ("smoe_transformer_tiny", (), (2, 8)),
        ("smoe_transformer_tiny", ("--moe-strata", "3-4-1"), (2, 5)),
    ],
)
def test_how_many_experts_a_router_allows(arch: str, words: tuple[str, ...], bounds: tuple[int, int]) -> None:
    sites = expert_sites(build_on_meta(arch, 100, (SHARED, *words)))
    assert [(site.low, site.high) for site in sites] == [bounds] * 2


def test_given_experts_count_proportionally(capsys: pytest.CaptureFixture[str]) -> None:
    experts = 2 * (2 * 128 * 128 + 128 + 128)  # two layers of one expert each
    most = of_arch(capsys, "xmoe_transformer_tiny", vocab=100)
    given = of_arch(capsys, "xmoe_transformer_tiny", "--experts-per-token", "2.5", vocab=100)
    assert (most["experts_per_token"], given["experts_per_token"]) == (8, 2.5)
    assert most["parameters"]["active"] - given["parameters"]["active"] == 5.5 * experts
    assert given["parameters"]["expert"] == most["parameters"]["expert"] == 8 * experts
    assert given["flops"]["experts"] == 2.5 * 2 * 2 * (2 * 128 * 128)
    assert given["flops_range"] == most["flops_range"]
    assert most["flops_range"][1] == most["flops_per_token"]
    assert "not measured" in most["assumption"] and "--experts-per-token" in given["assumption"]


def used(layer: str, received: int, experts: int = 8) -> LayerUsage:
    return LayerUsage(layer, 100, received, received, 0, 50.0, (received // experts,) * experts, (100,), 100)


def test_measured_experts(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measure(checkpoint: Path, data: Path, like: torch.nn.Module) -> list[LayerUsage]:
        asked.append((checkpoint, data))
        return [used("encoder.2", 400), used("decoder.2", 240)]

    monkeypatch.setattr(info, "measure", measure)
    words = ("xmoe_transformer_tiny", "--checkpoint", "best.pt", "--data", "bin")
    counted = of_arch(capsys, *words, vocab=100)
    assert asked == [(Path("best.pt"), Path("bin"))]
    assert [layer["taken"] for layer in counted["layers"]] == [4.0, 2.4]
    assert counted["experts_per_token"] == pytest.approx(3.2)
    assert counted["assumption"] == "measured on the test set of bin"
    with pytest.raises(UserError, match=r"other MoE layers \(encoder.2 of 8 experts, decoder.2 of 8 experts\)"):
        of_arch(capsys, *words, "--moe-num-experts", "4", vocab=100)


def test_stacked_layers_share_what_was_measured() -> None:
    model = build_on_meta("moe_transformer_tiny", 100, ("--moe-stack", "2"))
    taken = model_costs.measured(model, [used("encoder.2", 400, 16), used("decoder.2", 380, 16)])
    assert list(taken.values()) == [2.0, 2.0, 1.9, 1.9]


# --- what is printed -------------------------------------------------------------------------------------------------


def test_text_has_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main("info --arch smoe_transformer_m15_4_12 --vocab 32000".split())
    text = capsys.readouterr().out
    for figure in ("964.7M", "805.8M", "32,000", "4 of 16, from 2 to 4 possible", "not measured", "n = 32", "Kaplan"):
        assert figure in text
    assert max(map(len, text.splitlines())) < 160


def test_every_architecture_is_listed_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["info", "--list"])
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines]
    count = len(architectures())
    assert names[:count] == list(architectures()) and set(PRESETS) < set(names) and "transformer" in names
    assert all(len(line.split()) > 5 for line in lines)
    assert ask(capsys, "--list") == catalogue()
    for name, kind in (*ROUTERS.items(), *EXPERTS.items()):
        assert kind.paper, name  # each says where it is from
    others = [" ".join(line.split()[:2]) for line in lines[count:]]
    kinds = [*(f"--moe-router {name}" for name in ROUTERS), *(f"--moe-expert {name}" for name in EXPERTS)]
    assert others == [*kinds, "--moe-expert-sizes hybrid", "--moe-heads 2"]
    assert all("arXiv" in line for line in lines)
    assert catalogue()["smoe_transformer"].endswith(
        "SMoE: Xu et al. 2023, arXiv 2305.02176; GShard: Lepikhin et al. 2021, arXiv 2006.16668"
    )
    assert architectures()["moe_transformer_m4_cmr"] == (
        "MoE: 8 experts of hidden size 2048, top 2 (GShard); CMR; 1 layer in 2 of both stacks; "
        "d 512, feed-forward 2048, 6+6 layers"
    )


@pytest.mark.parametrize("words", [["--help"], [], ["info", "--help"]], ids=" ".join)
def test_help_has_an_example(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        cli.main(words)
    except SystemExit as end:
        assert end.code == 0
    assert "xmoe info --arch xmoe_transformer --vocab 32000" in capsys.readouterr().out


BAD = {
    "no arch": ("--vocab 100", "needs --arch NAME and --vocab"),
    "no vocabulary": ("--arch transformer", "needs --arch NAME and --vocab"),
    "unknown": ("--arch xmoe_transformer_tiniest --vocab 100", "did you mean xmoe_transformer_tiny"),
    "no transformer": ("--arch fconv_iwslt_de_en --vocab 100", "fconv_iwslt_de_en is no known architecture"),
    "small vocabulary": ("--arch transformer --vocab 0", "--vocab 0 is too small"),
    "word for a number": ("--arch transformer --vocab many", "argument --vocab: invalid int value"),
    "unknown option": ("--arch transformer --vocab 100 --moe-top-k 2", "unrecognized arguments: --moe-top-k 2"),
    "no number": ("--arch xmoe_transformer_tiny --vocab 100 --moe-top-k x", "--moe-top-k.* invalid int value: 'x'"),
    "out of range": ("--arch xmoe_transformer_tiny --vocab 100 --moe-threshold 2", "--moe-threshold 2.0 is out of"),
    "two widths": ("--arch transformer --vocab 100 --decoder-embed-dim 64", "--share-all-embeddings requires"),
    "heads": ("--arch transformer --vocab 100 --encoder-attention-heads 7", "divisible by num_heads"),
    "too many experts": (
        "--arch xmoe_transformer_tiny --vocab 100 --experts-per-token 9",
        "--experts-per-token 9 is out of range: .* from 1 to 8 experts",
    ),
    "dense": ("--arch transformer --vocab 100 --experts-per-token 1", "does not go with a dense model"),
    "context": ("--arch transformer --vocab 100 --context -1", "--context -1 is out of range"),
    "no number of positions": ("--arch transformer --vocab 100 --context nan", "--context nan is out of range"),
    "checkpoint alone": ("--arch transformer --vocab 100 --checkpoint x.pt", "--checkpoint and --data belong"),
    "measured and given": (
        "--arch xmoe_transformer_tiny --vocab 100 --checkpoint x.pt --data bin --experts-per-token 2",
        "give one of them",
    ),
    "no checkpoint": ("--arch xmoe_transformer_tiny --vocab 100 --checkpoint none.pt --data .", "no checkpoint none"),
}


@pytest.mark.parametrize(("words", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_in_one_line(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        cli.main(["info", *words.split()])
    assert "\n" not in str(error.value)


def test_unknown_command() -> None:
    with pytest.raises(UserError, match="no command 'inform': choose info"):
        cli.main(["inform"])


def test_the_program_ends_with_one_line_and_code_1() -> None:
    command = [sys.executable, "-m", "xmoe_fairseq", "info", "--arch", "none", "--vocab", "100"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1].startswith("xmoe_fairseq: error: --arch none is no known architecture")
