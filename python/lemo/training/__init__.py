"""Fine-tuning and evaluation of causal language models on long documents."""
