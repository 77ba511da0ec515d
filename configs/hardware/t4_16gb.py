"""NVIDIA T4 16 GB, with the host of FlexGen's evaluation; and the rates that FlexGen's cost model has for it.

    device memory           16 GiB GDDR6 at 320 GB/s            NVIDIA T4 datasheet (2019)
    FP16 tensor operations  65 TFLOP/s                          the same
    link                    PCIe 3.0 x16, 15.75 GB/s each way   PCI Express base specification 3.0: 8 GT/s, 128b/130b
    host memory             208 GB                              FlexGen (arXiv 2303.06865), section 6

`FLEXGEN_RATES` are the constants of FlexGen's released `experimental/cost_model.py`: fitted to runs on this machine, in GiB
per second and 10^12 operations per second.
"""

from alisa_jax.placement.modelled.devices import DEVICES
from alisa_jax.placement.modelled.flexgen_cost import FlexGenRates

HARDWARE = DEVICES["t4_16gb"]
FLEXGEN_RATES = FlexGenRates(
    cpu_to_gpu=12.89,
    gpu_to_cpu_cache=0.97,
    gpu_to_cpu_hidden=4.82,
    disk_to_cpu=0.473,
    cpu_to_disk_prefill=0.746,
    cpu_to_disk_decode=2.015,
    matmul_prefill=21.24,
    matmul_decode=4.3,
    bmm_prefill=9.97,
    bmm_decode=0.079,
    cpu=0.0123,
)
