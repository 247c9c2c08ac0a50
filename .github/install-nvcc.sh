#!/usr/bin/env bash
# In a manylinux_2_28 image: nvcc and its runtime, for the CUDA kernels of the wheel.
set -euo pipefail
architecture=$(uname -m)
repository=https://developer.download.nvidia.com/compute/cuda/repos/rhel8/${architecture/aarch64/sbsa}
dnf config-manager --add-repo "$repository/cuda-rhel8.repo"
dnf install -y cuda-nvcc-13-0 cuda-cudart-devel-13-0
