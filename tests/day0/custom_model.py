"""A model class that transformers has never seen: odd names, w1/w2/w3, its own norm, its own rotary, its own loss call."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

BASE = 500.0


class HarborConfig(PreTrainedConfig):
    """Sizes under names of its own."""

    model_type = "harbor"

    def __init__(self, width: int = 48, boats: int = 3, crew: int = 16, words: int = 131, decks: int = 2) -> None:
        self.width, self.boats, self.crew, self.words, self.decks = width, boats, crew, words, decks
        super().__init__()


@dataclass
class HarborOutput(ModelOutput):
    """What the forward returns."""

    loss: torch.Tensor | None = None
    scores: torch.Tensor | None = None


class Ballast(nn.Module):
    """An RMS norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heft, self.draught = nn.Parameter(torch.ones(width)), 1e-4

    def forward(self, water: torch.Tensor) -> torch.Tensor:
        level = water.float()
        level = level * torch.rsqrt(level.pow(2).mean(-1, keepdim=True) + self.draught)
        return level.type_as(water) * self.heft


def turn(
    bow: torch.Tensor, stern: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate pairs (2i, 2i + 1) of both by the same angles."""

    def quarter(x: torch.Tensor) -> torch.Tensor:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)

    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return bow * cos + quarter(bow) * sin, stern * cos + quarter(stern) * sin


class Lookout(nn.Module):
    """Causal attention, its three projections in one."""

    def __init__(self, config: HarborConfig) -> None:
        super().__init__()
        self.boats, self.crew = config.boats, config.crew
        self.rope_in = nn.Linear(config.width, 3 * config.boats * config.crew, bias=False)
        self.rope_out = nn.Linear(config.boats * config.crew, config.width)

    def forward(self, water: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        parts = self.rope_in(water).unflatten(-1, (3, self.boats, self.crew)).permute(2, 0, 3, 1, 4)
        bow, stern = turn(parts[0], parts[1], cos, sin)
        seen = F.scaled_dot_product_attention(bow, stern, parts[2], is_causal=True)
        return self.rope_out(seen.transpose(1, 2).flatten(2))


class Engine(nn.Module):
    """w2(silu(w1(x)) * w3(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(width, 80, bias=False), nn.Linear(80, width, bias=False)
        self.w3 = nn.Linear(width, 80, bias=False)

    def forward(self, water: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(water)) * self.w3(water))


class Deck(nn.Module):
    """One layer."""

    def __init__(self, config: HarborConfig) -> None:
        super().__init__()
        self.calm, self.calmer = Ballast(config.width), Ballast(config.width)
        self.lookout, self.engine = Lookout(config), Engine(config.width)

    def forward(self, water: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        water = water + self.lookout(self.calm(water), cos, sin)
        return water + self.engine(self.calmer(water))


class HarborForCausalLM(PreTrainedModel):
    """Embeddings, decks, a last norm, a head, and a loss that shifts by itself."""

    config_class = HarborConfig
    _no_split_modules = ("Deck",)

    def __init__(self, config: HarborConfig) -> None:
        super().__init__(config)
        self.cargo = nn.Embedding(config.words, config.width)
        self.decks = nn.ModuleList(Deck(config) for _ in range(config.decks))
        self.calm = Ballast(config.width)
        self.to_words = nn.Linear(config.width, config.words, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.to_words

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> HarborOutput:
        angles = torch.arange(input_ids.shape[1])[:, None] * BASE ** (
            -torch.arange(0, self.config.crew, 2) / self.config.crew
        )
        water = self.cargo(input_ids) * math.sqrt(self.config.width)
        cos, sin = (f(angles).repeat_interleave(2, -1)[None].to(water.dtype) for f in (torch.cos, torch.sin))
        for deck in self.decks:
            water = deck(water, cos, sin)
        scores = self.to_words(self.calm(water))
        if labels is None:
            return HarborOutput(scores=scores)
        loss = F.cross_entropy(scores[:, :-1].reshape(-1, self.config.words).float(), labels[:, 1:].reshape(-1))
        return HarborOutput(loss=loss, scores=scores)
