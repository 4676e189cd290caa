"""Linear layers: frozen weights in any form, with adapters, each as one autograd node."""
