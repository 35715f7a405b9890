"""Decoding by contrast: a model beside a weak form of itself, or beside itself with another input."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from fairseq.sequence_generator import EnsembleModel
from torch import Tensor, nn

# What is left of a probability where the difference would leave nothing, for tokens that must stay possible.
_LEAST = 1e-6


class Contrast(Protocol):
    """How two distributions become one."""

    def __call__(self, strong: Tensor, weak: Tensor) -> Tensor:
        """Combines natural logarithms of probabilities, (B, V) each: (B, V), -inf for what is not valid."""

    def least(self, strong: Tensor, combined: Tensor) -> Tensor:
        """Returns what tokens get that are not valid but must stay possible: less than the best of the valid ones.

        Args:
            strong: (B, n) their logarithms.
            combined: (B, V) those of all tokens, combined.
        """


class Ratio:
    """``log softmax((1 + beta) log p_s - beta log p_w)`` over the valid tokens, ``p_s >= alpha max p_s``.

    Source: Shi et al. 2024 (SCMoE, arXiv 2405.14507), eq. 5 and 6. A constant added to either argument changes nothing,
    so logits and logarithms of probabilities are both right.
    """

    def __init__(self, beta: float, alpha: float) -> None:
        self.beta, self.alpha = beta, alpha

    def scores(self, strong: Tensor, weak: Tensor) -> Tensor:
        """Returns the logits (B, V) before they are normalised."""
        valid = strong >= strong.amax(-1, keepdim=True) + math.log(self.alpha)
        return torch.where(valid, (1 + self.beta) * strong - self.beta * weak, -torch.inf)

    def __call__(self, strong: Tensor, weak: Tensor) -> Tensor:
        return self.scores(strong, weak).log_softmax(-1)

    def least(self, strong: Tensor, combined: Tensor) -> Tensor:
        # Of n valid tokens each has alpha max p_s or more, so the best has 1 / n >= alpha max p_s of what is combined.
        return strong


class Difference:
    """``log(p_s - beta p_w)``, not normalised; a token is valid if that is the logarithm of a positive number.

    Source: Sennrich et al. 2024 (arXiv 2309.07098), section 2; lambda there is beta here.
    """

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def __call__(self, strong: Tensor, weak: Tensor) -> Tensor:
        lost = self.beta * (weak - strong).exp()
        return torch.where(lost < 1, strong + torch.log1p(-lost.clamp(max=1)), -torch.inf)

    def least(self, strong: Tensor, combined: Tensor) -> Tensor:
        lowest = combined.masked_fill(combined.isneginf(), torch.inf).amin(-1, keepdim=True)
        return strong + math.log(_LEAST) + lowest.clamp(max=0)


class SameInput:
    """The weak model reads what the strong one reads."""

    def source(self, tokens: Tensor) -> Tensor:
        """tokens: (B, L) of the source, padded."""
        return tokens

    def target(self, tokens: Tensor) -> Tensor:
        """tokens: (B, length) of the translations so far."""
        return tokens


class ContrastiveEnsemble(EnsembleModel):
    """Takes the place of fairseq's ensemble: two models and what their distributions become.

    Padding is never valid. The end of sentence and the best other token always stay possible, with `Contrast.least` if
    they are not valid: at the longest length fairseq allows the end alone, and at the shortest all but the end.

    Args:
        strong: the model.
        weak: the model that it is contrasted with; it may be the same object.
        contrast: how their distributions are combined.
        change: what the weak model reads instead.
        dictionary: of the target.

    Attributes:
        plain: (B, V) the strong model's logarithms in the last step.
    """

    plain: Tensor

    def __init__(
        self, strong: nn.Module, weak: nn.Module, contrast: Contrast, change: SameInput, dictionary: Any
    ) -> None:
        super().__init__([strong, weak])
        self.contrast, self.change = contrast, change
        self.pad, self.eos = dictionary.pad(), dictionary.eos()
        self.alone = tuple(EnsembleModel([model]) for model in (strong, weak))
        self.one_encoder = strong.encoder is weak.encoder and type(change).source is SameInput.source

    def forward_encoder(self, net_input: dict[str, Any]) -> list[Any]:
        """Encodes the source; once if both models would read it alike."""
        strong = self.models[0].encoder.forward_torchscript(net_input)
        if self.one_encoder:
            return [strong, strong]
        tokens = self.change.source(net_input["src_tokens"])
        lengths = tokens.ne(self.pad).sum(-1)
        other = {**net_input, "src_tokens": tokens, "src_lengths": lengths}
        return [strong, self.models[1].encoder.forward_torchscript(other)]

    def reorder_encoder_out(self, encoder_outs: Any, new_order: Tensor) -> list[Any]:
        """Selects sentences, once if both models share them."""
        if self.one_encoder:
            return [self.models[0].encoder.reorder_encoder_out(encoder_outs[0], new_order)] * 2
        reordered: list[Any] = super().reorder_encoder_out(encoder_outs, new_order)
        return reordered

    def forward_decoder(
        self, tokens: Tensor, encoder_outs: Any, incremental_states: Any, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the logarithms of the next tokens' probabilities, (B, V), and the strong model's attention."""
        read = tokens, self.change.target(tokens)
        (strong, attention), (weak, _) = (
            model.forward_decoder(read[i], encoder_outs[i : i + 1], incremental_states[i : i + 1], temperature)
            for i, model in enumerate(self.alone)
        )
        self.plain = strong
        return self.combine(strong, weak), attention

    def combine(self, strong: Tensor, weak: Tensor) -> Tensor:
        """Combines natural logarithms of probabilities: (B, V) each."""
        strong = strong.index_fill(-1, torch.tensor([self.pad], device=strong.device), -torch.inf)
        combined = self.contrast(strong, weak)
        end = torch.full_like(strong[:, :1], self.eos, dtype=torch.long)
        other = strong.scatter(-1, end, -torch.inf).argmax(-1, keepdim=True)
        kept = torch.cat([end, other], dim=-1)
        values = combined.gather(-1, kept)
        values = torch.where(torch.isneginf(values), self.contrast.least(strong.gather(-1, kept), combined), values)
        return combined.scatter(-1, kept, values)

    def plain_prefixes(self, generator: Any) -> None:
        """Makes a generator score tokens that it is given, such as a language's, by the strong model alone."""
        stock = generator._prefix_tokens

        def prefix_tokens(
            step: int, lprobs: Tensor, scores: Tensor, tokens: Tensor, prefix: Tensor, beam_size: int
        ) -> Any:
            forced = prefix[:, step].ne(self.pad).repeat_interleave(beam_size).unsqueeze(-1)
            return stock(step, torch.where(forced, self.plain, lprobs), scores, tokens, prefix, beam_size)

        generator._prefix_tokens = prefix_tokens
