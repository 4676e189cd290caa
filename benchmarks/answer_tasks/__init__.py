"""Windows of real text with questions at the end whose answers the text holds, in the manner of
RULER (arXiv 2404.06654): what benchmarks/answers.py trains and evaluates on."""

from answer_tasks.haystacks import Haystacks, load_haystacks, make_haystacks
from answer_tasks.mixture import TASKS, TRAINED, Mixture
from answer_tasks.windows import Answer, Window

__all__ = [
    "TASKS",
    "TRAINED",
    "Answer",
    "Haystacks",
    "Mixture",
    "Window",
    "load_haystacks",
    "make_haystacks",
]
