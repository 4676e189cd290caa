"""Scores of a data set's blocks, computed once and kept in a folder (docs/design/selection.md).

`scores.json` says what they are of; `scores-00000.safetensors` and so on hold them. Each of the
files is written whole, so that a computation that was interrupted goes on behind the last of them.
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lemo.files import foreign, json_text, locked_output, read_json, remove_folder, write_file

__all__ = ["DESCRIPTION_FILE", "Example", "ScoreStore", "check_output", "write_scores"]

FORMAT, VERSION = "lemo-scores", 1
DESCRIPTION_FILE = "scores.json"
_OWN = re.compile(r"scores\.json|scores-\d{5}\.safetensors")

# Tokens of the examples of a file; what is lost at most when a computation is interrupted.
_FILE_TOKENS = 1 << 18
_DIGEST_BYTES = 32


class Example(Protocol):
    """An example as the model reads it, S tokens; `lemo.data` makes them."""

    @property
    def ids(self) -> Sequence[int]:
        """Token ids."""

    @property
    def labels(self) -> Sequence[int]:
        """The ids that are to be predicted, -100 elsewhere; not shifted."""

    @property
    def name(self) -> str:
        """A short name, for errors."""


@dataclass(frozen=True)
class _Description:
    """What `scores.json` says.

    Attributes:
        block_size: tokens of a block.
        files: examples of each file.
        data: digest of all examples, in their order.
        about: what the scores were made with.
    """

    block_size: int
    files: list[int]
    data: str
    about: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, examples: Sequence[Example], block_size: int, about: Mapping[str, Any]
    ) -> _Description:
        files = [end - first for first, end in _files(examples)]
        digest = hashlib.sha256(b"".join(map(_digest_of, examples)))
        try:
            plain = json.loads(json.dumps(dict(about), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"about: expected names and plain values, got {error}") from None
        return cls(block_size, files, digest.hexdigest(), plain)

    @classmethod
    def read(cls, folder: Path) -> _Description:
        file = folder / DESCRIPTION_FILE
        if not file.is_file():
            raise FileNotFoundError(
                f"scores: expected a folder of `lemo relevance scores`, but {file} does not exist"
            )
        content = read_json(file, f"scores: {file}")
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise ValueError(f"scores: {file} was not written by `lemo relevance scores`")
        version = content.pop("version", None)
        if version != VERSION:
            raise ValueError(f"scores: {file}: expected version {VERSION}, got {version!r}")
        kinds = {"block_size": int, "files": list, "data": str, "about": dict}
        for name, kind in kinds.items():
            if type(content.get(name)) is not kind:
                raise ValueError(
                    f"scores: {file}: field '{name}': expected {kind.__name__}, got "
                    f"{content.get(name)!r}"
                )
        known = cls(**{name: content[name] for name in kinds})
        if known.block_size < 1 or not all(type(n) is int and n > 0 for n in known.files):
            raise ValueError(f"scores: {file}: expected a block_size and files of 1 or more")
        return known

    def write(self, folder: Path) -> None:
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        write_file(folder / DESCRIPTION_FILE, json_text(content, indent=2))

    def digest(self) -> bytes:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).digest()

    def differences(self, wanted: _Description) -> list[str]:
        """What differs, as "name was this, now that"."""
        old, new = ({"block_size": d.block_size, **d.about} for d in (self, wanted))
        changed = _changed(old, new, sorted(old.keys() | new.keys()))
        if not changed and (self.data, self.files) != (wanted.data, wanted.files):
            changed.append("the examples are others now")
        return changed


class ScoreStore:
    """The scores in a folder, by example.

    Attributes:
        block_size: tokens of a block.
        about: what they were made with, as `write_scores` was told.
        digest: hexadecimal digest of all scores, wherever they lie.
    """

    def __init__(
        self,
        folder: Path,
        block_size: int,
        about: Mapping[str, Any],
        scores: Mapping[bytes, Tensor | None],
        wanted: Mapping[str, Any],
    ) -> None:
        self.block_size, self.about = block_size, about
        self._folder, self._scores, self._wanted = folder, scores, wanted
        digest = hashlib.sha256(str(block_size).encode())
        for key in sorted(scores):
            found = scores[key]
            digest.update(key + (b"" if found is None else found.numpy().tobytes()))
        self.digest = digest.hexdigest()

    @classmethod
    def read(cls, folder: str | Path, wanted: Mapping[str, Any] | None = None) -> ScoreStore:
        """Reads a folder that is complete.

        Args:
            folder: written by `lemo relevance scores` or `write_scores`.
            wanted: what scores are wanted for, names and values as in `about`; where an example has
                none the error says what differs.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: it is damaged, its computation has not ended, or scores are not finite.
        """
        folder = Path(folder)
        description = _Description.read(folder)
        scores: dict[bytes, Tensor | None] = {}
        for number in range(len(description.files)):
            file = _file(folder, number)
            if not file.is_file():
                raise ValueError(
                    f"scores: '{folder}' lacks {file.name} of {len(description.files)} such files: "
                    "its computation has not ended; go on with `lemo relevance scores --resume`"
                )
            scores |= _read_file(file, description)
        return cls(folder, description.block_size, description.about, scores, wanted or {})

    def of(self, example: Example) -> Tensor | None:
        """Scores of its blocks, [ceil(S / block_size)] fp32; None: it has no answers.

        Raises:
            KeyError: the folder has no such example, with these ids and labels.
        """
        return self._scores[_digest_of(example)]

    def check(self, examples: Sequence[Example]) -> None:
        """Raises ValueError, saying what differs, unless every example is in the folder."""
        missing = [each.name for each in examples if _digest_of(each) not in self._scores]
        if not missing:
            return
        both = sorted(self.about.keys() & self._wanted.keys())
        changed = _changed(self.about, self._wanted, both) or ["the data or the chat template"]
        raise ValueError(
            f"scores: expected scores of every example, but '{self._folder}' has none of "
            f"{len(missing)} of {len(examples)}, such as {missing[0]}; what differs: "
            f"{'; '.join(changed)}; run `lemo relevance scores` with the settings of this run"
        )


def write_scores(
    folder: str | Path,
    examples: Sequence[Example],
    score: Callable[[Example], Tensor | Sequence[float] | None],
    *,
    block_size: int,
    about: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes the scores of examples to a folder, for `elimination.scores` of a run.

        windows = lemo.data.open_training_data("data.jsonl", tokenizer, 8192)
        write_scores("scores", windows.examples, my_scores, block_size=64)

    Args:
        folder: where to.
        examples: as the run reads them, see `lemo.data.ExampleWindows.examples`.
        score: gives the scores of an example's blocks [ceil(S / block_size)], higher is more
            informative; None: blocks are drawn at random in every epoch.
        block_size: tokens of a block; 1: `score` gives one number for each token.
        about: what the scores are made with, names and plain values. They must be the same when
            the computation goes on; "tokenizer" (`lemo.training.fingerprint.of_tokenizer`),
            "context_length" and "labels" are compared where a run finds no scores of an example.
        resume: goes on with what was interrupted; what is there already is not computed again.
        overwrite: replaces scores that are there.
        report: called as report(done, total) after every example.

    Raises:
        FileExistsError: the folder exists and neither `resume` nor `overwrite` is set, or it holds
            something else.
        FileNotFoundError: there is nothing to resume.
        BlockingIOError: another process writes to it.
        ValueError: scores of another number, or not finite; `about` is not plain; what is resumed
            was made with other settings.
        OSError: the disk is full or cannot be written; files that are there stay whole.
    """
    if resume and overwrite:
        raise ValueError("resume, overwrite: expected at most one of the two, got both")
    if not examples:
        raise ValueError("examples: expected one or more, got none")
    if block_size < 1:
        raise ValueError(f"block_size: expected 1 or more, got {block_size}")
    with locked_output(folder) as place:
        description = _Description.of(examples, block_size, about or {})
        check_output(place, resume, overwrite)
        if resume:
            changed = _Description.read(place).differences(description)
            if changed:
                raise ValueError(
                    f"resume: '{folder}' was made with other settings: {'; '.join(changed)}"
                )
        started = resume
        for number, (first, end) in enumerate(_files(examples)):
            if started and _is_whole(_file(place, number), description):
                report(end, len(examples))
                continue
            parts = []
            for index in range(first, end):
                parts.append(_checked(score(examples[index]), examples[index], block_size))
                report(index + 1, len(examples))
            if not started:
                # Not before there is something to write: an error leaves what was there.
                _start(place, description)
                started = True
            content = _content(examples[first:end], parts, description)
            write_file(_file(place, number), content)


def check_output(folder: Path, resume: bool, overwrite: bool) -> None:
    """Raises unless scores may be written to `folder`; see `write_scores`."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output: expected a folder, but '{folder}' is a file")
    there = folder.is_dir() and any(folder.iterdir())
    if resume:
        if not (folder / DESCRIPTION_FILE).is_file():
            raise FileNotFoundError(f"output: there are no scores in '{folder}' to resume")
        return
    if not there:
        return
    if not overwrite:
        raise FileExistsError(
            f"output: '{folder}' is not empty; --resume goes on with scores that are there, "
            "--overwrite replaces them"
        )
    strangers = foreign(folder, _OWN)
    if strangers:
        raise FileExistsError(
            f"overwrite: lemo did not write '{strangers[0]}' and deletes nothing there; choose "
            "another output"
        )
    if (folder / DESCRIPTION_FILE).exists():
        _Description.read(folder)  # nobody else's file of this name


def _start(folder: Path, description: _Description) -> None:
    if folder.is_dir():
        remove_folder(folder, _OWN)
    folder.mkdir(parents=True)
    description.write(folder)


def _files(examples: Sequence[Example]) -> Iterator[tuple[int, int]]:
    """(first, end) of the examples, one or more, of each file."""
    first = tokens = 0
    for index, example in enumerate(examples):
        if tokens and tokens + len(example.ids) > _FILE_TOKENS:
            yield first, index
            first, tokens = index, 0
        tokens += len(example.ids)
    yield first, len(examples)


def _file(folder: Path, number: int) -> Path:
    return folder / f"scores-{number:05d}.safetensors"


def _digest_of(example: Example) -> bytes:
    tokens = array("q", example.ids) + array("q", example.labels)
    return hashlib.sha256(tokens).digest()


def _checked(
    scores: Tensor | Sequence[float] | None, example: Example, block_size: int
) -> Tensor | None:
    if scores is None:
        return None
    found = torch.as_tensor(scores).detach().to("cpu", torch.float32)
    blocks = -(-len(example.ids) // block_size)
    if tuple(found.shape) != (blocks,):
        raise ValueError(
            f"scores: expected one for each block, [{blocks}], of {example.name}, got "
            f"{list(found.shape)}"
        )
    _check_finite(found, example.name)
    return found


def _check_finite(scores: Tensor, name: str | Path) -> None:
    """Raises ValueError, naming what they are of, unless scores are finite."""
    wrong = scores[~scores.isfinite()]
    if len(wrong):
        raise ValueError(
            f"scores: expected finite numbers in fp32 for {name}, got {wrong[0].item()}"
        )


def _content(
    examples: Sequence[Example], scores: Sequence[Tensor | None], description: _Description
) -> bytes:
    """The bytes of a file."""
    keys = b"".join(map(_digest_of, examples))
    tensors = {
        "examples": torch.frombuffer(bytearray(keys), dtype=torch.uint8),
        # -1: no scores.
        "blocks": torch.tensor([-1 if part is None else len(part) for part in scores]),
        "scores": torch.cat([torch.empty(0), *(part for part in scores if part is not None)]),
    }
    return save(tensors, metadata={"sha256": _checksum(tensors, description)})


def _checksum(tensors: Mapping[str, Tensor], description: _Description) -> str:
    """Of a file's tensors and of the description that they belong to."""
    digest = hashlib.sha256(description.digest())
    for name in ("examples", "blocks", "scores"):
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _read_file(file: Path, description: _Description) -> dict[bytes, Tensor | None]:
    """Scores of a file by the digests of its examples; ValueError where it is not whole, or what is
    in it is not finite."""
    try:
        content = file.read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        tensors = load(content)
        fits = header["__metadata__"]["sha256"] == _checksum(tensors, description)
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError, AttributeError):
        fits = False
    if not fits:
        raise ValueError(
            f"scores: {file} is damaged or of another computation; `lemo relevance scores "
            "--resume` computes it again"
        )
    _check_finite(tensors["scores"], file)
    keys, counts = tensors["examples"].numpy().tobytes(), tensors["blocks"].tolist()
    parts = iter(tensors["scores"].split([count for count in counts if count >= 0]))
    return {
        keys[at : at + _DIGEST_BYTES]: next(parts) if count >= 0 else None
        for at, count in zip(range(0, len(keys), _DIGEST_BYTES), counts, strict=True)
    }


def _is_whole(file: Path, description: _Description) -> bool:
    try:
        _read_file(file, description)
    except (ValueError, FileNotFoundError):
        return False
    return True


def _changed(old: Mapping[str, Any], new: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """What differs among `names`, as "name was this, now that"."""
    pairs = [(name, old.get(name), new.get(name)) for name in names]
    return [
        # Digests say nothing to a reader.
        f"{name} is another one"
        if _is_digest(a) or _is_digest(b)
        else f"{name} was {a!r}, now {b!r}"
        for name, a, b in pairs
        if a != b
    ]


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None
