"""docs/settings.md is what the settings say of themselves."""

from pathlib import Path

import pytest

from lemo.settings.base import fields_of
from lemo.settings.finetune import FinetuneConfig
from lemo.settings.page import page
from lemo.settings.preparation import PrepareConfig
from lemo.settings.relevance import HeadsConfig, ScoresConfig

pytestmark = pytest.mark.cpu_only

PAGE = Path(__file__).resolve().parents[2] / "docs" / "settings.md"


def test_the_page_is_what_the_code_prints():
    assert PAGE.read_text(encoding="utf-8") == page(), (
        "run: python -m lemo.settings.page > docs/settings.md"
    )


def test_every_setting_is_on_the_page_and_described():
    settings = (FinetuneConfig, PrepareConfig, HeadsConfig, ScoresConfig)
    fields = [field for each in settings for field in fields_of(each)]
    assert len(fields) > 70
    for name, field in fields:
        assert f"| `{name.rpartition('.')[2]}` |" in page()
        assert field.description, name
        assert field.description.endswith("."), name
