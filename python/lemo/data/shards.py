"""Tables in shards, as the Hugging Face Hub keeps them: train-00000-of-00002.parquet and so on."""

import re
from pathlib import Path

__all__ = ["shards_at"]

_SHARD = re.compile(
    r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(-\w+)?"
    r"\.(parquet|csv|json|jsonl|jsonl\.xz|jsonl\.gz)"
)


def shards_at(path: Path, argument: str) -> list[Path]:
    """The shards of one split, in their order; none: there are no shards.

    Args:
        path: a folder with the shards of one split, or folder/split, which is no file itself.
        argument: what the path is called in messages.

    Raises:
        ValueError: the folder holds several splits, or a shard is missing or there twice.
    """
    is_folder = path.is_dir()
    folder = path if is_folder else path.parent
    if not folder.is_dir() or (path.exists() and not is_folder):
        return []
    found: dict[str, list[re.Match[str]]] = {}
    for file in sorted(folder.iterdir()):
        shard = _SHARD.fullmatch(file.name)
        if shard and (is_folder or shard["split"] == path.name):
            found.setdefault(shard["split"], []).append(shard)
    if len(found) > 1:
        splits = ", ".join(str(folder / split) for split in found)
        raise ValueError(f"{argument}: '{folder}' holds several splits, name one of them: {splits}")
    for shards in found.values():
        count = int(shards[0]["count"])
        if [(int(each["number"]), int(each["count"])) for each in shards] != [
            (number, count) for number in range(count)
        ]:
            names = ", ".join(each.string for each in shards)
            raise ValueError(
                f"{argument}: expected {count} shards in '{folder}', each of them once, got {names}"
            )
        return [folder / each.string for each in shards]
    return []
