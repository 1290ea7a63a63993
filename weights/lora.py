"""LoRA adapters (arXiv 2106.09685): low-rank updates of frozen linear layers.

What is trained is A and B of each `model.LoRALinear`. Sampler and trainer run the same forward with
them (P34); they are never merged while a run lasts, since bf16 would round small updates away.
"""

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from common.files import whole_folder
from model import LoRALinear, Transformer

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
           "in_proj_qkv", "in_proj_z", "out_proj")      # the last three of gated DeltaNets


def add(model: Transformer, rank: int, alpha: float, targets: list[str], seed: int) -> None:
    """Freezes the model and gives its linear layers of these names adapters, scaled by alpha /
    rank. They change nothing yet: A is drawn as peft draws it, B is 0.

    Raises ValueError where no layer has one of the names, or the rank is beyond a full one.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for layer in model.layers:
        for part in (layer.mixer, layer.mlp):
            for name in (name for name in part if name in targets):
                if rank > (side := min(part[name].weight.shape)):
                    raise ValueError(f"--lora-rank {rank} is more than the {side} that the smaller "
                                     f"side of {name} has: give at most that")
                part[name] = LoRALinear(part[name], rank, alpha / rank)
                a = part[name].lora_A.detach()
                bound = a.shape[1] ** -0.5              # kaiming_uniform_(a=sqrt(5))
                a.copy_(torch.rand(a.shape, generator=generator) * 2 * bound - bound)
    if not adapters(model):
        raise ValueError(f"--lora-targets {','.join(targets)}: this model has none of them")


def without(model: Transformer) -> Transformer:
    """The start model: a second one on the same frozen weights, which takes no memory."""
    start = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    for layer in start.layers:
        for part in (layer.mixer, layer.mlp):
            for name, m in part.items():
                if isinstance(m, LoRALinear):
                    part[name] = nn.Linear(m.in_features, m.out_features, False, device="meta")
                    part[name].weight, part[name].bias = m.weight, m.bias
    return start


def adapters(model: Transformer) -> dict[str, LoRALinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def merged(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """The parameters by name, each update added to its weight in fp32."""
    updated = {f"{name}.weight": m for name, m in adapters(model).items()}
    for name, p in model.named_parameters():
        if name in updated:
            m = updated[name]
            p = (p.float() + m.scale * (m.lora_B.float() @ m.lora_A.float())).to(p.dtype)
        if "lora_" not in name:
            yield name, p


def save(model: Transformer, base: str, folder: str | Path) -> None:
    """Writes the adapters as a folder that peft loads on top of `base`. Whole or not at all."""
    from safetensors.torch import save_file

    found = adapters(model)
    tensors = {f"base_model.model.model.{name}.{matrix}.weight": getattr(m, matrix).detach().cpu()
               for name, m in found.items() for matrix in ("lora_A", "lora_B")}
    one = next(iter(found.values()))
    rank = len(one.lora_A)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
              "r": rank, "lora_alpha": one.scale * rank, "lora_dropout": 0.0, "bias": "none",
              "target_modules": sorted({name.rpartition(".")[2] for name in found})}
    with whole_folder(Path(folder)) as part:
        save_file(tensors, part / "adapter_model.safetensors", {"format": "pt"})
        (part / "adapter_config.json").write_text(json.dumps(config, indent=1))
