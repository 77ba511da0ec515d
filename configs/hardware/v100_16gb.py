"""NVIDIA Tesla V100 SXM2 16 GB, with the host of ALISA's evaluation.

    device memory           16 GiB HBM2 at 900 GB/s             NVIDIA Tesla V100 datasheet (2018)
    FP16 tensor operations  125 TFLOP/s                         the same
    link                    PCIe 3.0 x16, 15.75 GB/s each way   PCI Express base specification 3.0: 8 GT/s, 128b/130b
    host memory             128 GB                              ALISA, section VI

ALISA states 20 GB/s between CPU and GPU, which PCIe 3.0 does not reach; the figures above are those of the parts.
"""

from alisa_jax.placement.modelled.devices import DEVICES

HARDWARE = DEVICES["v100_16gb"]
