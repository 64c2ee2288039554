"""Importing this module loads the compiled ops, `torch.ops.pspnet_fast_native`. It holds nothing itself."""
