"""Every op in plain PyTorch: the definition the faster backends are held to."""
