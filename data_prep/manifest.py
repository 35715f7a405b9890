"""The stages' records, by which a later run knows what is finished, and the MANIFEST.json made of them."""

from __future__ import annotations

import json
import platform
import textwrap
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from io_utils import fingerprint, new_folder, write_lines

from xmoe_fairseq.errors import UserError

# Written into a stage's folder before the folder gets its name: where it is, the stage is finished.
RECORD = ".stage.json"
MANIFEST = "MANIFEST.json"
TOOLS = ("torch", "fairseq-fixed", "sentencepiece", "babel")


def tool_versions() -> dict[str, str | None]:
    """Gives the versions of what shapes the output, ``None`` for what is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for tool in TOOLS:
        try:
            versions[tool] = metadata.version(tool)
        except metadata.PackageNotFoundError:
            versions[tool] = None
    return versions


def finished_stage(out: Path, name: str, parameters: Mapping[str, Any]) -> dict[str, Any] | None:
    """Gives the record of a stage that an earlier run finished with the same parameters, ``None`` if there is none.

    Raises:
        UserError: where ``out/name`` is of other parameters, damaged, or not from here.
    """
    folder = out / name
    if not folder.exists():
        return None
    record = _read_record(folder)
    _check_parameters(out, record["parameters"], parameters)
    _check_files(folder, record["files"])
    print(f"{name}: already finished, skipped", flush=True)
    return record


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
        files = {path.name: fingerprint(path) for path in sorted(temporary.iterdir())}
        record = {"parameters": dict(parameters), **details, "files": files}
        write_lines(temporary / RECORD, [json.dumps(record, ensure_ascii=False)])
    print(f"{name}: {len(files)} files written", flush=True)
    return record


def write_manifest(out: Path, records: Mapping[str, dict[str, Any]]) -> None:
    """Writes MANIFEST.json from the records of the stages, in their order; leaves one that is there as it is."""
    if (out / MANIFEST).exists():
        return
    # A later stage depends on all that an earlier one depends on.
    *_, last = records.values()
    parameters = last["parameters"]
    stages = {
        name: {key: value for key, value in record.items() if key != "parameters"} for name, record in records.items()
    }
    write_lines(out / MANIFEST, [json.dumps({**parameters, **stages}, ensure_ascii=False, indent=1)])


def _read_record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} was not made by this program: choose another --out or remove it") from error
    return record


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
            f"choose another --out, or delete {out} to prepare it anew"
        )


def _brief(value: Any) -> str:
    return textwrap.shorten(json.dumps(value, ensure_ascii=False), 100, placeholder=" ...")


def _check_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    for name, known in files.items():
        path = folder / name
        if not path.exists() or path.stat().st_size != known["bytes"]:
            raise UserError(f"{path} is missing or was changed after it was made: delete {folder} to make it again")
