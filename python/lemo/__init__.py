"""lemo: fine-tune large language models on very long sequences with contextual token sparsity."""

__version__ = "0.1.0"
