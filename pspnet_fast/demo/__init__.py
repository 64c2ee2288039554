"""`make demo`: PSPNet learns on drawn scenes, and plain PyTorch is compared with the kernels."""
