"""The benchmarks as data: which languages, how they are sampled, how large the vocabulary is."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Benchmark:
    """One set of languages, each translated from and into English.

    Attributes:
        name: ``--benchmark NAME`` of ``data_prep/prepare.sh`` and ``--task multilingual_NAME``.
        languages: the languages beside English, in the order that fixes their token ids;
            empty where the data folder decides.
        vocab_size: SentencePiece pieces, the 256 byte pieces included.
        sampling_temperature: a pair with n of N training lines is drawn with a weight of (n / N) ** (1 / T).
        sizes: lines a pair in train, valid and test, where the project generates the text.
    """

    name: str
    languages: tuple[str, ...]
    vocab_size: int
    sampling_temperature: float
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def pairs(self) -> tuple[str, ...]:
        """The pairs as they are stored, English first: ``en-ca``."""
        return tuple(f"en-{language}" for language in self.languages)


def directions(languages: tuple[str, ...] | list[str]) -> list[str]:
    """Names both directions of every pair with English, in the order of ``languages``."""
    return [direction for xx in languages for direction in (f"en-{xx}", f"{xx}-en")]


# Romance, Austronesian, Kartvelian (its own script) and Bantu, all written with spaces between words.
DEMO4 = ("ca", "id", "ka", "sw")
# What CLDR covers of NLLB-M15 (ca fo gl id is lb ms no sl), and for the others the nearest that it covers:
# ha, so and sw for nso, ssw and run, jv for tgl, nl for lim, vec for fur.
DEMO15 = ("ca", "fo", "gl", "ha", "id", "is", "jv", "lb", "ms", "nl", "no", "sl", "so", "sw", "vec")
# Languages with full sets of names and patterns of their own in CLDR.
_DEMO94 = (
    "af am ar as ast az be bew bg bn br bs ca chr cs da de dsb el es et eu fa fi fo fr frr ga gd gl gu ha he hi hr "
    "hsb hu hy ia id is it ja jv ka kab kgp km kn ko ky lb lij lt lv mk ml mr ms my ne nl nn no or pa pl ps pt ro "
    "ru sc sd si sk sl so sq sr sv sw ta te th ti tk tr uk ur uz vec vi yrl zh"
)
DEMO94: tuple[str, ...] = tuple(_DEMO94.split())


BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("demo4", DEMO4, 2000, 1.0, {"train": 20_000, "valid": 200, "test": 250}),
        Benchmark("demo15", DEMO15, 6000, 1.0, {"train": 10_000, "valid": 200, "test": 250}),
        Benchmark("demo94", DEMO94, 24_000, 1.0, {"train": 2_000, "valid": 100, "test": 100}),
        Benchmark("local", (), 8000, 1.5),
    )
}
