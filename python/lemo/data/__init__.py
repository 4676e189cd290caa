"""Documents and conversations, and the windows made of them."""

from lemo.data.batches import TrainingBatch, collate
from lemo.data.documents import Document, read_documents
from lemo.data.examples import ExampleWindows
from lemo.data.prefetch import prefetched, tokenizing_threads
from lemo.data.training_data import open_training_data
from lemo.data.windows import TokenWindows, first_windows, token_windows

__all__ = [
    "Document",
    "ExampleWindows",
    "TokenWindows",
    "TrainingBatch",
    "collate",
    "first_windows",
    "open_training_data",
    "prefetched",
    "read_documents",
    "token_windows",
    "tokenizing_threads",
]
