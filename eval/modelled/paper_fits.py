"""Which number of `eval.modelled.paper_system` is fitted on which published one. No bar of ALISA in Figure 9 is used.

link        the bytes that `flexgen` copies over FlexGen's memory time: H100, the last mark of Figure 12a (10 % of the
            cache on the GPU); V100, Figure 1 with the whole cache on the CPU
a, c        two ends. Batch 64: FlexGen's compute in the same two figures. Batch 4: Figure 9's cells of OPT-30B, and of
            LLaMA-33B for LLaMA's a; the geometric mean of vLLM's step and FlexGen's less its copies, because they
            differ by a half and the step is to be common. The other models' a goes with their layers, their c with
            their weight operations. A c below 0 is taken as 0
alpha, row  Figure 12b without recomputation, the memory times at 80 and 20 %: Phase II from p1 to the end
beta        Figure 12a: the share of the dense cache that is gone at the end
T           Figure 12b at 80 %: compute with less compute without recomputation, per step of Phase III
hooks       Accelerate's cell of OPT-30B at batch 4
sequences   that vLLM runs at a time on the H100: its cell of OPT-30B at batch 64
"""

import dataclasses
import math
from types import MappingProxyType

from alisa_jax.placement.modelled.cost import Cost, paper_traffic_s
from alisa_jax.placement.plan import Setting
from eval.modelled import paper_system
from eval.modelled.paper_system import INT8, LLAMA_33B, OPT_30B, Fits, Place

MANY, FEW = 64, 4
FIGURE_1 = Place("OPT-6.7B", "opt_6.7b", "v100_32gb")
FITTED_CELLS = frozenset(  # of Figure 9: (model, system, batch); FlexGen's last one is the total of Figure 12b
    {
        ("OPT-30B", "flexgen", FEW),
        ("OPT-30B", "vllm", FEW),
        ("OPT-30B", "hf_accelerate", FEW),
        ("OPT-30B", "flexgen", MANY),
        ("OPT-30B", "vllm", MANY),
        ("LLaMA-33B", "flexgen", FEW),
        ("LLaMA-33B", "vllm", FEW),
    }
)


def fit(published: dict) -> Fits:
    """The fitted numbers, from eval/paper/alisa_throughput.json."""
    compute, memory = _figure_1(published)
    last = published["fig12a_s"]["flexgen"][-1]
    link, late = {}, {}  # by GPU: bytes per second; seconds of a step at batch 64
    for place, frac, compute_s, memory_s in (
        (OPT_30B, 0.1, last["compute_s"], last["memory_s"]),
        (FIGURE_1, 0.0, compute, memory),
    ):
        setting, cost = paper_system.run(place, MANY, published)
        link[place.gpu] = _copied(setting, cost, frac) / memory_s
        late[place.gpu] = _step_s(compute_s, setting, cost)
    opt, llama, small = (paper_system.run(place, 1, published)[1].shape for place in (OPT_30B, LLAMA_33B, FIGURE_1))
    opt_s, llama_s = (_early_s(place, published, link[place.gpu]) for place in (OPT_30B, LLAMA_33B))
    c = max(0.0, (late["h100"] - opt_s) / (MANY - FEW)) / opt.weight_flops
    layer = {
        "opt": (opt_s - FEW * c * opt.weight_flops) / opt.layers,
        "llama": (llama_s - FEW * c * llama.weight_flops) / llama.layers,
    }
    rates = {"h100": c, "v100": max(0.0, late["v100"] - layer["opt"] * small.layers) / (MANY * small.weight_flops)}
    alpha, position_s = traffic(published)
    sizes = published["fig12a_gib"]
    found = Fits(
        link_bytes_per_s=MappingProxyType(link),
        layer_s=MappingProxyType(layer),
        flops_per_s=MappingProxyType({gpu: 1.0 / one if one else math.inf for gpu, one in rates.items()}),
        row_bytes_per_s=_position_bytes(published) / position_s,
        alpha=alpha,
        beta=1.0 - sizes["kv_at_end"] / sizes["dense_kv_at_end"],
        recompute_passes=_recompute_passes(published),
    )
    return _with_cells(found, published)


def traffic(published: dict) -> tuple[float, float]:
    """(alpha, seconds of one position on the link): Equations 3 and 4 through two memory times of Figure 12b."""
    work, p1 = published["workload"], published["fig12a_steps"]["80"]["p1"]
    tokens = [work["prompt_tokens"] + j for j in range(p1, work["new_tokens"])]
    wanted, spent = [], []
    for key in ("80", "20"):
        wanted.append(sum(paper_traffic_s(1.0, 0.0, 1.0 - int(key) / 100, t, 1.0) for t in tokens))
        spent.append(memory_s(published["fig12b_s"][key]["without_recompute"]))
    position_s = (spent[1] - spent[0]) / (wanted[1] - wanted[0])
    return (spent[0] / position_s - wanted[0]) / sum(tokens), position_s


def memory_s(times: dict) -> float:
    """The memory time of a bar of Figure 12b: what MHA and FFN leave of the total."""
    return times["total_s"] - times["mha_s"] - times["ffn_s"]


def _figure_1(published: dict) -> tuple[float, float]:
    times = published["fig1_s"]["kv_on_cpu"]
    return times["mha_s"] + times["ffn_s"], times["memory_s"]


def _copied(setting: Setting, cost: Cost, frac: float) -> float:
    found = paper_system.flexgen(setting, cost, frac)
    return found.load_bytes + found.store_bytes


def _step_s(compute_s: float, setting: Setting, cost: Cost) -> float:
    return (compute_s - cost.prefill_s(setting.prompt_tokens)) / (setting.new_tokens - 1)


def _early_s(place: Place, published: dict, link: float) -> float:
    """Seconds of a step at batch 4: the geometric mean of vLLM's and of FlexGen's without its copies."""
    setting, cost = paper_system.run(place, FEW, published)
    tokens, bars = FEW * setting.new_tokens, published["fig9_tokens_per_s"][place.model]
    flexgen = tokens / bars["flexgen"][0] - _copied(setting, cost, 0.1) / link
    return math.sqrt(_step_s(tokens / bars["vllm"][0], setting, cost) * _step_s(flexgen, setting, cost))


def _position_bytes(published: dict) -> float:
    setting, _ = paper_system.run(OPT_30B, MANY, published, codec=INT8)
    return setting.batch * setting.layers * setting.token_bytes


def _recompute_passes(published: dict) -> float:
    """Dense passes of a token that the time of a recomputation, by sequence and step, is at the GPU's published rate."""
    times, p2 = published["fig12b_s"]["80"], published["fig12a_steps"]["80"]["p2"]
    more = sum(times["with_recompute"][part] - times["without_recompute"][part] for part in ("mha_s", "ffn_s"))
    _, cost = paper_system.run(OPT_30B, 1, published)
    step = more / (published["workload"]["new_tokens"] - p2) / MANY
    return step * cost.hardware.matmul_flops_per_s / cost.shape.weight_flops


def _with_cells(fits: Fits, published: dict) -> Fits:
    """Accelerate's hooks and vLLM's sequences, from a cell of Figure 9 each."""
    bars = published["fig9_tokens_per_s"]["OPT-30B"]
    setting, cost = paper_system.run(OPT_30B, FEW, published, fits)
    bare = paper_system.seconds("hf_accelerate", OPT_30B, FEW, published, fits).total_s
    hooks = FEW * setting.new_tokens / bars["hf_accelerate"][0] - bare
    fits = dataclasses.replace(fits, accelerate_layer_s=max(0.0, hooks) / (setting.layers * (setting.new_tokens - 1)))
    tried, target = [], MANY * setting.new_tokens / bars["vllm"][-1]
    for waves in range(1, MANY + 1):  # the more, the longer
        some = dataclasses.replace(fits, vllm_sequences=MappingProxyType({"h100": -(-MANY // waves)}))
        tried.append((paper_system.seconds("vllm", OPT_30B, MANY, published, some).total_s, some))
        if tried[-1][0] > target:
            break
    return min(tried, key=lambda one: abs(math.log(one[0] / target)))[1]
