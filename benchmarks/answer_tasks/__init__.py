"""Windows of real text with questions at the end whose answers the text holds, in the manner of
RULER (arXiv 2404.06654): what benchmarks/answers.py trains and evaluates on."""

from answer_tasks.haystacks import Haystacks, load_haystacks, make_haystacks
from answer_tasks.mixture import TASKS, Mixture
from answer_tasks.windows import Answer, Window

__all__ = [
    "TASKS",
    "Answer",
    "Haystacks",
    "Mixture",
    "Window",
    "load_haystacks",
    "make_haystacks",
]
