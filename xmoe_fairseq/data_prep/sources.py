"""Files of the published sources: downloaded, or already there, and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..mt_benchmarks import Source
from .download import check, download
from .io_utils import Side

# (split, language, other language) -> the files of both, which follow each other; None if a test set has no text.
Corpus = dict[tuple[str, str, str], list[tuple[Side | None, Side | None]]]


def merge(*parts: Corpus) -> Corpus:
    """Joins corpora; if two have the same split and pair their files follow each other."""
    whole: Corpus = {}
    for part in parts:
        for key, files in part.items():
            whole.setdefault(key, []).extend(files)
    return whole


@dataclass
class Store:
    """Where the files of the sources are.

    Attributes:
        folder: downloads go here, and stay for another run.
        urls: addresses that replace the published ones, by the name of the source.
        archives: files, or folders of files under their published names, that replace downloads.
        checksums: sha256 that replace the published ones.
        record: what was used, for MANIFEST.json.
    """

    folder: Path
    urls: Mapping[str, str] = field(default_factory=dict)
    archives: Mapping[str, Path] = field(default_factory=dict)
    checksums: Mapping[str, str] = field(default_factory=dict)
    record: dict[str, dict[str, Any]] = field(default_factory=dict)

    def get(self, source: Source, **places: str) -> Path:
        """Returns one file of a source.

        Args:
            source: one of the benchmark's.
            places: the values of ``{pair}`` and ``{corpus}`` in its address.

        Raises:
            UserError: the file cannot be had or is not the one expected; `NotThereError` if the server lacks it.
        """
        name = source.file.format(**places)
        own_checksum = source.name in self.checksums
        sha256 = self.checksums[source.name] if own_checksum else source.sha256
        size = None if own_checksum else source.size
        if source.name in self.archives:
            path = self.archives[source.name]
            path = path / name if path.is_dir() else path
            if not path.is_file():
                raise UserError(f"--archive {source.name}={self.archives[source.name]}: there is no file {path}")
            self.record[name] = {"source": source.name, **check(path, size, sha256)}
            return path
        url = _address(source, self.urls.get(source.name, source.url), places)
        path = self.folder / name
        self.record[name] = {"source": source.name, "url": url, **download(url, path, size, sha256)}
        return path


def _address(source: Source, template: str, places: Mapping[str, str]) -> str:
    if missing := [place for place in places if f"{{{place}}}" in source.url and f"{{{place}}}" not in template]:
        raise UserError(
            f"--url {source.name}={template}: it lacks {{{missing[0]}}}, for the source has a file for each "
            f"{missing[0]}; its own address is {source.url}"
        )
    for place, value in places.items():
        template = template.replace(f"{{{place}}}", value)
    return template
