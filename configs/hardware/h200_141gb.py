"""NVIDIA H200 SXM 141 GB, with a host of 128 GiB.

device memory           141 GB HBM3e at 4.8 TB/s            NVIDIA H200 datasheet (2024)
FP16 tensor operations  989.4 TFLOP/s, dense                the same (1,979 with sparsity)
link                    PCIe 5.0 x16, 63 GB/s each way      PCI Express base specification 5.0: 32 GT/s, 128b/130b
host memory             128 GiB                             our choice: a common size of one GPU's share of a node
"""

from alisa_jax.placement.modelled.devices import DEVICES

HARDWARE = DEVICES["h200_141gb"]
