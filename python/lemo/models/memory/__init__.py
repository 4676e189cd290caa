"""Where tensors lie: on the GPU, on the host, or in parts on several processes."""
