"""The tables of all settings, a Markdown page: python -m lemo.settings.page > docs/settings.md"""

from __future__ import annotations

import inspect

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from lemo.settings.base import Settings, expected, group_of
from lemo.settings.elimination import LayerwiseConfig, LemoConfig
from lemo.settings.finetune import FinetuneConfig
from lemo.settings.preparation import PredictorSettings, PrepareConfig
from lemo.settings.relevance import HeadsConfig, ScoresConfig

_HEAD = """# Settings

All settings of lemo: fields of the Python classes, keys of the YAML files of `--config`, and names
for `--set` (`--set elimination.layerwise.dense_layers=[0,-1]`). The code prints this page:
`python -m lemo.settings.page`.
"""

# (class, heading, what is said before its table)
_PARTS: tuple[tuple[type[Settings], str, str], ...] = (
    (LemoConfig, "Elimination", "`lemo.LemoConfig`; in a run's file the group `elimination`."),
    (
        LayerwiseConfig,
        "Elimination: the paper's own policies",
        "`lemo.settings.elimination.LayerwiseConfig`; in a run's file the group "
        "`elimination.layerwise`.",
    ),
    (FinetuneConfig, "`lemo finetune`", "`lemo.settings.finetune.FinetuneConfig`."),
    (
        PredictorSettings,
        "Predictors",
        "`lemo.settings.preparation.PredictorSettings`: what `lemo.preparation.pipeline.prepare` "
        "takes.",
    ),
    (
        PrepareConfig,
        "`lemo prepare`",
        "`lemo.settings.preparation.PrepareConfig`: the settings of predictors, and these.",
    ),
    (HeadsConfig, "`lemo relevance heads`", "`lemo.settings.relevance.HeadsConfig`."),
    (ScoresConfig, "`lemo relevance scores`", "`lemo.settings.relevance.ScoresConfig`."),
)


def page() -> str:
    """The page."""
    parts = [_HEAD]
    for cls, heading, where in _PARTS:
        known = PredictorSettings.model_fields if cls is PrepareConfig else {}
        rows = [_row(name, field) for name, field in cls.model_fields.items() if name not in known]
        parts += [
            f"## {heading}\n",
            f"{where} {inspect.cleandoc(cls.__doc__ or '')}\n",
            "| name | value | default | meaning |\n|---|---|---|---|",
            "\n".join(rows) + "\n",
        ]
    return "\n".join(parts)


def _row(name: str, field: FieldInfo) -> str:
    cells = (f"`{name}`", expected(field), _default(field), str(field.description))
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "needed"
    if group_of(field) is not None:
        return "the defaults of the group"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    if value is None or isinstance(value, bool):
        return f"`{str(value).lower() if value is not None else 'null'}`"
    return f"`{value}`"


if __name__ == "__main__":
    print(page(), end="")
