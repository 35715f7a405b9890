"""The stages' records, by which a later run knows what is finished, and the MANIFEST.json made of them."""

from __future__ import annotations

import json
import os
import platform
import textwrap
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from ..common.schema import build
from ..errors import UserError
from .io_utils import check_file, fingerprint, new_folder, write_lines

# Written into a stage's folder before the folder gets its name: where it is, the stage is finished.
RECORD = ".stage.json"
MANIFEST = "MANIFEST.json"
TOOLS = ("torch", "fairseq-fixed", "sentencepiece", "babel")
Counts = Mapping[str, int]


@dataclass(frozen=True)
class FileRecord:
    """What is known of a file that a stage wrote."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class StageRecord:
    """What every stage records: what decided its result, and its files by their names."""

    parameters: Mapping[str, Any]
    files: Mapping[str, FileRecord]


@dataclass(frozen=True)
class RawRecord(StageRecord):
    """The text; see `raw_text.write`."""

    lines: Counts
    dropped_lines: Mapping[str, Any] = field(default_factory=dict)
    blank_lines: Counts = field(default_factory=dict)
    crlf_lines: Counts = field(default_factory=dict)
    archives: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class SpmRecord(StageRecord):
    """The vocabulary; see `learn_spm.write` and, of one that is taken, `vocabulary.write`."""

    pieces: int
    lines_used: Counts
    taken_from: str = ""
    unknown_pieces: int = 0


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of a binary text, and of its longest line."""

    total: int
    longest: int


@dataclass(frozen=True)
class BinRecord(StageRecord):
    """The binary files; see `binarize.write`."""

    tokens: Mapping[str, TokenCounts]
    dropped_lines: Mapping[str, Any] = field(default_factory=dict)


RECORDS: dict[str, type[StageRecord]] = {"raw": RawRecord, "spm": SpmRecord, "bin": BinRecord}


def tool_versions() -> dict[str, str | None]:
    """Returns the versions of what shapes the output, ``None`` for what is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for tool in TOOLS:
        try:
            versions[tool] = metadata.version(tool)
        except metadata.PackageNotFoundError:
            versions[tool] = None
    return versions


def finished_stage(
    out: Path, name: str, parameters: Mapping[str, Any], files: Collection[str]
) -> dict[str, Any] | None:
    """Returns the record of a stage that an earlier run finished with the same parameters, ``None`` if there is none.

    Args:
        out: the folder of the whole preparation.
        name: the stage.
        parameters: everything that decides its result.
        files: that it makes.

    Raises:
        UserError: ``out/name`` is of other parameters, damaged, or not from here.
    """
    folder = out / name
    if not os.path.lexists(folder):
        return None
    record = _read_record(folder, RECORDS[name])
    _check_parameters(out, record["parameters"], parameters)
    if name == "raw" and (uncounted := {file.rpartition(".")[0] for file in files} - record["lines"].keys()):
        raise UserError(
            f"{folder / RECORD} is damaged, it lacks the lines of {min(uncounted)}: delete {folder} to make it again"
        )
    _check_files(folder, record["files"], files)
    print(f"{name}: already finished, skipped", flush=True)
    return record


def check_contents(folder: Path, record: Mapping[str, Any]) -> None:
    """Compares the files of a finished stage with their recorded checksums.

    Raises:
        UserError: names a file that was changed.
    """
    for name, known in record["files"].items():
        if fingerprint(folder / name) != known:
            raise _changed(folder / name)


def run_stage(
    out: Path, name: str, parameters: Mapping[str, Any], write: Callable[[Path], dict[str, Any]]
) -> dict[str, Any]:
    """Makes ``out/name``, which appears only when it is complete.

    Args:
        out: the folder of the whole preparation.
        name: the stage, and its folder in ``out``.
        parameters: everything that decides the stage's result.
        write: writes the stage's files into the folder it is given and returns what is worth recording.

    Returns:
        The stage's record: what ``write`` returned, ``parameters``, and size and sha256 of each file.
    """
    print(f"{name}: started", flush=True)
    # It describes what is being replaced.
    (out / MANIFEST).unlink(missing_ok=True)
    with new_folder(out / name) as temporary:
        details = write(temporary)
        made = sorted(path for path in temporary.rglob("*") if not path.is_dir())
        files = {str(path.relative_to(temporary)): fingerprint(path) for path in made}
        record = {"parameters": dict(parameters), **details, "files": files}
        write_lines(temporary / RECORD, [json.dumps(record, ensure_ascii=False)])
    print(f"{name}: {len(files)} files written", flush=True)
    return record


def write_manifest(out: Path, records: Mapping[str, dict[str, Any]]) -> None:
    """Writes MANIFEST.json from the records of the stages, in their order; leaves one that says the same as it is.

    Raises:
        UserError: something else than a file has its name.
    """
    # A later stage depends on all that an earlier one depends on.
    *_, last = records.values()
    parameters = last["parameters"]
    stages = {
        name: {key: value for key, value in record.items() if key != "parameters"} for name, record in records.items()
    }
    path, manifest = out / MANIFEST, {**parameters, **stages}
    if os.path.lexists(path):
        check_file(path)
        if _read_json(path) == manifest:
            return
        print(f"{path} is damaged or was changed: rewritten from the records of the stages", flush=True)
    write_lines(path, [json.dumps(manifest, ensure_ascii=False, indent=1)])


def _read_json(path: Path) -> Any:
    """Returns what a file holds, ``None`` if that is no JSON."""
    check_file(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None


def _read_record(folder: Path, kind: type[StageRecord]) -> dict[str, Any]:
    try:
        record = _read_json(folder / RECORD)
    except OSError as error:
        raise UserError(f"{folder} was not made by this program: choose another --out or remove it") from error
    build(kind, record, str(folder / RECORD), f"it is damaged: delete {folder} to make it again")
    checked: dict[str, Any] = record
    return checked


def _check_parameters(out: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    for key, value in new.items():
        # What another version began must be finished by that version; what is complete is good for all.
        if old.get(key) == value or (key == "tools" and (out / MANIFEST).exists()):
            continue
        # An option that is not used now and did not exist then.
        if key not in old and not value:
            continue
        before, now = old.get(key), value
        if isinstance(before, dict) and isinstance(now, dict):
            key, before, now = next(
                (f"{key} {item}", before.get(item), now.get(item))
                for item in [*now, *before]
                if before.get(item) != now.get(item)
            )
        raise UserError(
            f"{out} was prepared with {key} = {_brief(before)}, now it is {_brief(now)}: "
            f"choose another --out, or delete {out} to prepare it again"
        )


def _brief(value: Any) -> str:
    return textwrap.shorten(json.dumps(value, ensure_ascii=False), 100, placeholder=" ...")


def _check_files(folder: Path, known: Mapping[str, Mapping[str, Any]], names: Collection[str]) -> None:
    if strange := sorted(known.keys() ^ set(names)):
        raise UserError(
            f"{folder / RECORD} is damaged, or of another version: {strange[0]!r} is recorded or made, not both: "
            f"delete {folder} to make it again"
        )
    for name, record in known.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != record["bytes"]:
            raise _changed(path)


def _changed(path: Path) -> UserError:
    return UserError(f"{path} is missing or was changed after it was made: delete {path.parent} to make it again")
