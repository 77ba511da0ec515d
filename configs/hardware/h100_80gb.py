"""NVIDIA H100 SXM 80 GB, with the host of ALISA's evaluation.

    device memory           80 GiB HBM3 at 3.35 TB/s            NVIDIA H100 datasheet (2023)
    FP16 tensor operations  989.4 TFLOP/s, dense                the same (1,979 with sparsity)
    link                    PCIe 5.0 x16, 63 GB/s each way      PCI Express base specification 5.0: 32 GT/s, 128b/130b
    host memory             128 GB                              ALISA, section VI

ALISA states 20 GB/s between CPU and GPU; the figures above are those of the parts.
"""

from alisa_jax.placement.modelled.devices import DEVICES

HARDWARE = DEVICES["h100_80gb"]
