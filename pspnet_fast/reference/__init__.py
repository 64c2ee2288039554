"""The ops in plain PyTorch: the specification that every kernel is read and tested against."""
