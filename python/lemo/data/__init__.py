"""Documents and the token windows cut from them."""

from lemo.data.documents import Document, read_documents
from lemo.data.prefetch import prefetched, tokenizing_threads
from lemo.data.windows import TokenWindows, first_windows, token_windows

__all__ = [
    "Document",
    "TokenWindows",
    "first_windows",
    "prefetched",
    "read_documents",
    "token_windows",
    "tokenizing_threads",
]
