"""Figure 9: throughput of Accelerate, FlexGen, vLLM and ALISA by batch, modelled for the paper's GPUs and measured here.

    python -m eval.reproduce --only=fig9

115 seconds of core time were measured on 2 CPU cores that other work shared, nearly all of it compiling, 15 of them for
the modelled cells. ALISA's modelled bars and ratios to FlexGen are within 24 %. QUICK measures one batch, FULL those of
the paper.
"""

QUICK = dict(batches=(16,), prompt_tokens=64, new_tokens=48, repeats=1, device_kv_frac=0.8)
FULL = dict(batches=(4, 8, 16, 32, 64), prompt_tokens=128, new_tokens=512, repeats=3, device_kv_frac=0.8)
