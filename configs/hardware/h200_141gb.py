"""NVIDIA H200 SXM 141 GB, with a host of 128 GiB.

device memory           141 GB HBM3e at 4.8 TB/s            NVIDIA H200 datasheet (2024)
FP16 tensor operations  989.4 TFLOP/s, dense                the same (1,979 with sparsity)
link                    PCIe 5.0 x16, 63 GB/s each way      PCI Express base specification 5.0: 32 GT/s, 128b/130b
host memory             128 GiB                             our choice: a common size of one GPU's share of a node
"""

from alisa_jax.placement.modelled.cost import Hardware

HARDWARE = Hardware(
    name="h200_141gb",
    device_bytes=141e9,
    host_bytes=128 * 2.0**30,
    matmul_flops_per_s=989.4e12,
    read_bytes_per_s=4.8e12,
    to_device_bytes_per_s=63e9,
    to_host_bytes_per_s=63e9,
)
