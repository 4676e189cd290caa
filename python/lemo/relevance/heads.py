"""Retrieval heads: attention heads that look at what an answer is copied from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lemo.files import digest_of, json_text, read_json, write_file
from lemo.predictors.model import check_embedding

__all__ = ["RetrievalHeads"]

FORMAT, VERSION = "lemo-heads", 1


@dataclass(frozen=True)
class RetrievalHeads:
    """Some heads of a model, found by `lemo relevance heads`.

    Attributes:
        model: their model, see `lemo.predictors.model.model_description`.
        heads: (layer, head) pairs, both counted from 0.
        found_by: how they were found: settings, and recall on generated needles.
    """

    model: Mapping[str, Any]
    heads: tuple[tuple[int, int], ...]
    found_by: Mapping[str, Any] = field(default_factory=dict)

    def by_layer(self) -> dict[int, list[int]]:
        """The heads of each layer that has some, both ascending."""
        layers: dict[int, list[int]] = {}
        for layer, head in sorted(self.heads):
            layers.setdefault(layer, []).append(head)
        return layers

    def save(self, path: str | Path) -> None:
        """Writes them as JSON, whole or not at all."""
        digest = {"digest": digest_of(self.heads)}
        content = {"format": FORMAT, "version": VERSION, **asdict(self), **digest}
        write_file(Path(path), json_text(content, indent=2))

    @classmethod
    def load(cls, path: str | Path, model: Mapping[str, Any]) -> RetrievalHeads:
        """Reads what `save` wrote.

        Args:
            path: the file.
            model: description or shape of the model that they are wanted for. With a description
                a warning says where the embedding is another one.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no such file, was changed, or made for a model of another shape.
        """
        place = f"heads: {path}"
        try:
            content = read_json(Path(path), place)
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(f"{place}: expected a file, found none") from None
        except IsADirectoryError:
            raise ValueError(f"{place}: expected a file, got a folder") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{place}: expected a file of `lemo relevance heads`, got another")
        if content.get("version") != VERSION:
            raise ValueError(f"{place}: expected version {VERSION}, got {content.get('version')!r}")
        found = content.get("model")
        found = found if isinstance(found, dict) else {}
        shape = [name for name in model if name != "embedding"]
        changed = [name for name in shape if found.get(name) != model[name]]
        if changed:
            raise ValueError(
                f"{place}: expected heads of a model of this shape, but these differ: "
                f"{', '.join(changed)}"
            )
        heads: Any = content.get("heads")
        sizes = model["num_layers"], model["num_attention_heads"]
        if not _are_heads(heads, *sizes):
            raise ValueError(
                f"{place}: expected [layer, head] pairs below {list(sizes)}, got {heads!r}"
            )
        if content.get("digest") not in (None, digest_of(heads)):  # Earlier files have none.
            raise ValueError(
                f"{place}: these are not the heads that were written; run `lemo relevance heads` "
                "again"
            )
        check_embedding(place, found, model, "lemo relevance heads")
        pairs = tuple((layer, head) for layer, head in heads)
        return cls(content["model"], pairs, content.get("found_by", {}))


def _are_heads(value: Any, layers: int, heads: int) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(
        isinstance(pair, list)
        and len(pair) == 2
        and all(type(number) is int for number in pair)
        and 0 <= pair[0] < layers
        and 0 <= pair[1] < heads
        for pair in value
    )
