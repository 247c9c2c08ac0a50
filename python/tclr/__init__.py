"""The reference trainer of `tclr_kernels`: the paper's clips, a small 3D ResNet, pretraining, retrieval, the demo."""
