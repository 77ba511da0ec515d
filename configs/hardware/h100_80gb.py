"""NVIDIA H100 SXM 80 GB, with the host of ALISA's evaluation.

    device memory           80 GiB HBM3 at 3.35 TB/s            NVIDIA H100 datasheet (2023)
    FP16 tensor operations  989.4 TFLOP/s, dense                the same (1,979 with sparsity)
    link                    PCIe 5.0 x16, 63 GB/s each way      PCI Express base specification 5.0: 32 GT/s, 128b/130b
    host memory             128 GB                              ALISA, section VI

ALISA states 20 GB/s between CPU and GPU; the figures above are those of the parts.
"""

from alisa_jax.placement.modelled.cost import Hardware

HARDWARE = Hardware(
    name="h100_80gb",
    device_bytes=80 * 2.0**30,
    host_bytes=128e9,
    matmul_flops_per_s=989.4e12,
    read_bytes_per_s=3.35e12,
    to_device_bytes_per_s=63e9,
    to_host_bytes_per_s=63e9,
)
