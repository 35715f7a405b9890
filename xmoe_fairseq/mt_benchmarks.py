"""The benchmarks as data: languages, groups, sampling, vocabulary size, decoding, and where the text comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .common.directions import Direction


@dataclass(frozen=True)
class Source:
    """One published collection of text; ``data_prep/prepare.sh --source NAME`` takes it.

    Attributes:
        name: of the source.
        url: where it was published; ``{pair}`` and ``{corpus}`` stand for what each of its files is of.
        file: its file name, with the same places.
        gives: what is in it.
        comparable: whether figures from it can be set beside those of the papers, and why.
        size: bytes of the file, where known.
        sha256: of the file, where known.
    """

    name: str
    url: str
    file: str
    gives: str
    comparable: str
    size: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Benchmark:
    """One set of languages, each translated from and into English.

    Attributes:
        name: ``--benchmark NAME`` of ``data_prep/prepare.sh`` and ``--task multilingual_NAME``.
        languages: the languages beside English, in the order that fixes their token ids;
            empty if the data folder decides.
        vocab_size: SentencePiece pieces, the 256 byte pieces included.
        sampling_temperature: a pair with n of N training lines is drawn with a weight of (n / N) ** (1 / T).
        sizes: lines per pair in train, valid and test, where the project generates the text.
        english: the code of English.
        groups: languages by the amount of their training text; empty if groups.tsv of the data decides.
        valid_lines: lines of each development set that validation reads; 0 for all.
        beam: beam size for translation.
        lenpen: length penalty for translation.
        sources: where its text can come from, the default first; empty if it is generated or the user's.
    """

    name: str
    languages: tuple[str, ...]
    vocab_size: int
    sampling_temperature: float
    sizes: Mapping[str, int] = field(default_factory=dict)
    english: str = "en"
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    valid_lines: int = 0
    beam: int = 5
    lenpen: float = 1.0
    sources: tuple[Source, ...] = ()

    @property
    def pairs(self) -> tuple[str, ...]:
        """The pairs as they are stored, English first: ``en-ca``."""
        return tuple(f"{self.english}-{language}" for language in self.languages)

    def group_of(self, language: str) -> str:
        """Names the group of a language; ``all`` where the benchmark has none."""
        return next((group for group, members in self.groups.items() if language in members), "all")


def directions(languages: Sequence[str], english: str = "en") -> list[Direction]:
    """Names both directions of every pair with English, in the order of ``languages``."""
    return [one for xx in languages for one in (Direction(english, xx), Direction(xx, english))]


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

# The 94 languages of OPUS-100 that have a development and a test set; an, dz, hy, mn and yo have none.
# By training pairs: at least 0.9 million, at least 0.1 million, fewer.
_OPUS100 = {
    "high": (
        "ar bg bn bs ca cs da de el es et eu fa fi fr he hr hu id is it ja ko lt lv mk ms mt nl no pl pt ro ru si sk "
        "sl sq sr sv th tr uk vi zh"
    ),
    "medium": "af as az br cy eo ga gl gu hi ka km ku mg ml nb ne nn pa rw sh ta tg tt ur uz wa xh",
    "low": "am be fy gd ha ig kk kn ky li mr my oc or ps se te tk ug yi zu",
}
OPUS100_GROUPS = {group: tuple(names.split()) for group, names in _OPUS100.items()}
OPUS100 = tuple(sorted(language for members in OPUS100_GROUPS.values() for language in members))
# The order and the groups of the authors of the benchmark. Their lists do not follow the counts everywhere:
# cat (1.07 million pairs) is in "low", ssw (0.13 million) in "very_low".
M15 = ("nso", "run", "ssw", "ind", "msa", "isl", "nob", "fao", "slv", "tgl", "cat", "glg", "fur", "ltz", "lim")
M15_GROUPS = {
    "high": ("ind", "msa", "isl", "slv", "tgl"),
    "low": ("nso", "run", "nob", "cat", "glg"),
    "very_low": ("ssw", "fao", "fur", "ltz", "lim"),
}
M4 = ("nso", "msa", "tgl", "cat")
M4_GROUPS = {"high": ("msa", "tgl"), "low": ("nso", "cat")}

_OPUS100_URL = "https://object.pouta.csc.fi/OPUS-100/v1.0/"
_OPUS100_GIVES = "train, valid (dev) and test of OPUS-100 v1.0"
OPUS100_SOURCES = (
    Source(
        "pairs",
        _OPUS100_URL + "opus-100-corpus-{pair}-v1.0.tar.gz",
        "opus-100-corpus-{pair}-v1.0.tar.gz",
        f"{_OPUS100_GIVES}, an archive a pair",
        "yes",
    ),
    Source(
        "whole",
        _OPUS100_URL + "opus-100-corpus-v1.0.tar.gz",
        "opus-100-corpus-v1.0.tar.gz",
        f"{_OPUS100_GIVES}, one archive of some 7 GB",
        "yes",
    ),
)
FLORES200 = Source(
    "flores",
    "https://dl.fbaipublicfiles.com/nllb/flores200_dataset.tar.gz",
    "flores200_dataset.tar.gz",
    "valid (dev, 997 lines) and test (devtest, 1012 lines) of m4 and m15",
    "yes",
    25_585_843,
    "b8b0b76783024b85797e5cc75064eb83fc5288b41e9654dabc7be6ae944011f6",
)
NLLB_SOURCES = (
    Source(
        "drive",
        "https://drive.usercontent.google.com/download?id=1tT2urUunXLNEPZxxV2nK-YmC_N6P_48m&export=download&confirm=t",
        "m15.zip",
        "train, valid and test of the benchmark's authors",
        "yes, but the vocabulary is learned again",
    ),
    Source(
        "opus",
        "https://object.pouta.csc.fi/OPUS-{corpus}/moses/{pair}.txt.zip",
        "{corpus}/{pair}.txt.zip",
        "train of the corpora in --opus-corpora",
        "no: NLLB's primary text holds corpora that are no longer published",
    ),
    Source(
        "seed",
        "https://tinyurl.com/NLLBSeed",
        "NLLB-Seed.zip",
        "train of fur and lim, some 6,000 lines each",
        "nearly, for fur and lim: it is most of their primary text",
    ),
    Source(
        "mined",
        "https://storage.googleapis.com/allennlp-data-bucket/nllb/{pair}.gz",
        "nllb-{pair}.gz",
        "train of nso run ssw msa fao tgl fur ltz lim, mined from the web",
        "no: another kind and amount of text",
    ),
)

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("demo4", DEMO4, 2000, 1.0, {"train": 20_000, "valid": 200, "test": 250}),
        Benchmark("demo15", DEMO15, 6000, 1.0, {"train": 10_000, "valid": 200, "test": 250}),
        Benchmark("demo94", DEMO94, 24_000, 1.0, {"train": 2_000, "valid": 100, "test": 100}),
        Benchmark("local", (), 8000, 1.5),
        Benchmark("m4", M4, 32_000, 1.0, english="eng", groups=M4_GROUPS, sources=NLLB_SOURCES),
        Benchmark("m15", M15, 32_000, 1.0, english="eng", groups=M15_GROUPS, valid_lines=100, sources=NLLB_SOURCES),
        Benchmark("opus100", OPUS100, 64_000, 5.0, groups=OPUS100_GROUPS, valid_lines=100, sources=OPUS100_SOURCES),
    )
}

# Of each benchmark, as ``--task`` takes it.
BY_TASK = {f"multilingual_{name}": benchmark for name, benchmark in BENCHMARKS.items()}
