"""The preference losses as pure functions, each with its use, its equation and its paper.

To add one is to add a function here: ``--loss``, its help, ``dpo losses`` and the table of docs/losses.md follow. The
parameters of a loss name what it reads. torch is imported at the first call, so that help does without it.

In the equations r = log pi(y|x)/ref(y|x), or what an f-divergence makes of that ratio, w and l are the chosen and the
rejected response, h = r_w - r_l, m is the pair's margin, eps the label smoothing and |y| the tokens that carry loss.

Legend: P pairs. Responses are ordered chosen first: ``logps[:P]`` chosen, ``logps[P:]`` rejected.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

RUN_OPTIONS = ("beta", "label_smoothing", "f_divergence")  # parameters of a loss that are options of the run
PAIR_FIELDS = ("margins", "reward_baseline", "ranking_sizes")  # parameters of a loss that are fields of ``Preferences``


Divergence = Callable[["Tensor"], "Tensor"]


def reverse_kl(logratios: Tensor) -> Tensor:
    """Return log u of the ratio u = pi/ref: the divergence of DPO; divergences.py has others."""
    return logratios


def logsigmoid(x: Tensor) -> Tensor:
    """Compute log(1 / (1 + exp(-x)))."""
    import torch.nn.functional as F

    return F.logsigmoid(x)


@dataclass(frozen=True)
class Preferences:
    """What a loss reads of P pairs.

    ``logps`` and ``ref_logps`` are sums of weighted token log-probs (LD-DPO), ``full_logps`` plain sums under the
    policy. ``mean_chosen_length`` is the mean over the step's chosen responses, ``reward_baseline`` the mean reward of
    earlier steps. ``weights`` multiply the losses. ``ranking_sizes``: the pairs of each ranking, best answer first, in
    which the rejected response of a pair is the chosen one of the next; 1: each pair is a ranking of its own.

    Shapes: ``logps``, ``ref_logps``, ``lengths``, ``full_logps`` (2P,); ``margins`` and ``weights`` (P,) or a number.
    Units: nats; ``lengths`` and ``mean_chosen_length`` in tokens that carry loss.
    """

    logps: Tensor
    ref_logps: Tensor
    lengths: Tensor
    full_logps: Tensor
    mean_chosen_length: float
    margins: Tensor | float = 0.0
    weights: Tensor | float = 1.0
    reward_baseline: float = 0.0
    ranking_sizes: Sequence[int] | int = 1

    def logratios(self, f_divergence: Divergence = reverse_kl) -> tuple[Tensor, Tensor]:
        """Return r of the chosen and of the rejected responses: (P,) each."""
        chosen, rejected = f_divergence(self.logps - self.ref_logps).chunk(2)
        return chosen, rejected

    def per_token(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Divide values (2P,) by the lengths of the responses: (P,) for chosen and rejected."""
        chosen, rejected = (values / self.lengths).chunk(2)
        return chosen, rejected


@dataclass(frozen=True)
class Loss:
    """A loss and its description. ``reads``: its parameters, with their defaults.

    ``reference``: whether it reads the reference; ``length_normalized``: whether its rewards are per token.
    """

    name: str
    compute: Callable[..., Tensor]
    use: str
    formula: str
    paper: str
    reads: Mapping[str, Any]
    reference: bool = True
    length_normalized: bool = False

    @property
    def options(self) -> dict[str, float]:
        """The options of this loss alone, with their defaults."""
        return {name: default for name, default in self.reads.items() if name not in RUN_OPTIONS + PAIR_FIELDS}


LOSSES: dict[str, Loss] = {}


def preference_loss(**properties: bool) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register a function as a loss that ``--loss`` knows by its name. ``properties``: see ``Loss``.

    Its docstring has three paragraphs: when to use it, the equation, the source.

    Shapes: its ``Preferences`` are of P pairs -> (P,).
    """

    def add(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
        use, formula, paper = (" ".join(part.split()) for part in inspect.cleandoc(compute.__doc__ or "").split("\n\n"))
        _, *parameters = inspect.signature(compute).parameters.values()
        reads = {each.name: each.default for each in parameters}
        name = compute.__name__
        LOSSES[name] = Loss(name, compute, use, formula, paper.removeprefix("Source: "), reads, **properties)
        return compute

    return add


def logsumexp_onwards(values: Tensor, sizes: Sequence[int] | int) -> Tensor:
    """Compute the log-sum-exp of each value and all after it, in parts of these sizes: (P,) -> (P,)."""
    import torch

    return torch.cat([part.flip(0).logcumsumexp(0).flip(0) for part in values.split(sizes)])


def _smoothed_sigmoid(logits: Tensor, margins: Tensor, eps: float) -> Tensor:
    return -(1 - eps) * logsigmoid(logits - margins) - eps * logsigmoid(-logits - margins)


# ---- losses with a reference ------------------------------------------------------------------------------------


@preference_loss()
def sigmoid(
    p: Preferences, beta: float, margins: Tensor, label_smoothing: float = 0.0, f_divergence: Divergence = reverse_kl
) -> Tensor:
    """DPO, the default; label smoothing (conservative DPO) helps where labels may be flipped.

        -(1 - eps) log sigma(beta h - m) - eps log sigma(-beta h - m)

    Source: equation 7 of arXiv 2305.18290; eps after https://ericmitchell.ai/cdpo.pdf; m of arXiv 2402.10571
    """
    chosen_logratios, rejected_logratios = p.logratios(f_divergence)
    losses = -logsigmoid(beta * (chosen_logratios - rejected_logratios) - margins)
    flipped = -logsigmoid(beta * (rejected_logratios - chosen_logratios) - margins)  # the same at a flipped label
    return (1 - label_smoothing) * losses + label_smoothing * flipped


@preference_loss()
def robust(
    p: Preferences, beta: float, margins: Tensor, label_smoothing: float = 0.0, f_divergence: Divergence = reverse_kl
) -> Tensor:
    """For labels of which a known share eps is flipped: an unbiased estimate of the loss on clean labels.

        (-(1 - eps) log sigma(beta h - m) + eps log sigma(-beta h - m)) / (1 - 2 eps)

    Source: arXiv 2403.00409
    """
    chosen, rejected = p.logratios(f_divergence)
    logits, eps = beta * (chosen - rejected), label_smoothing
    return ((eps - 1) * logsigmoid(logits - margins) + eps * logsigmoid(-logits - margins)) / (1 - 2 * eps)


@preference_loss()
def sigmoid_norm(p: Preferences, beta: float, f_divergence: Divergence = reverse_kl) -> Tensor:
    """Counters growing response lengths: log-ratios per token; scale beta up by the mean response length.

        -log sigma(beta (r_w/|y_w| - r_l/|y_l|))

    Source: length-normalised DPO, as in arXiv 2411.15124
    """
    chosen, rejected = p.per_token(f_divergence(p.logps - p.ref_logps))
    return -logsigmoid(beta * (chosen - rejected))


@preference_loss()
def hinge(p: Preferences, beta: float, margins: Tensor, f_divergence: Divergence = reverse_kl) -> Tensor:
    """A pair whose margin is large enough has no gradient.

        max(0, 1 + m - beta h)

    Source: SLiC, arXiv 2305.10425; of log-ratios in arXiv 2309.06657
    """
    chosen, rejected = p.logratios(f_divergence)
    return (1 + margins - beta * (chosen - rejected)).relu()


@preference_loss()
def ipo(p: Preferences, beta: float, f_divergence: Divergence = reverse_kl) -> Tensor:
    """Where DPO overfits: pulls the per-token difference to a fixed value from both sides.

        (r_w/|y_w| - r_l/|y_l| - 1/(2 beta))^2

    Source: equation 17 of arXiv 2310.12036, averaged over tokens as its authors confirmed to TRL
    """
    chosen, rejected = p.per_token(f_divergence(p.logps - p.ref_logps))
    return (chosen - rejected - 1 / (2 * beta)).square()


@preference_loss()
def dpop(
    p: Preferences, beta: float, margins: Tensor, label_smoothing: float = 0.0, dpop_lambda: float = 50.0
) -> Tensor:
    """For pairs that differ in a few tokens (edits, sums), where DPO lowers the chosen response: penalizes that.

        -log sigma(beta (h - lambda max(0, -r_w)) - m)

    Source: DPO-Positive, arXiv 2402.13228
    """
    chosen, rejected = p.logratios()
    return _smoothed_sigmoid(beta * (chosen - rejected - dpop_lambda * (-chosen).relu()), margins, label_smoothing)


@preference_loss()
def exo_pair(p: Preferences, beta: float, label_smoothing: float, f_divergence: Divergence = reverse_kl) -> Tensor:
    """Mode-seeking where DPO covers all modes; needs eps > 0, in the paper 0.001.

        q log(q / (1 - eps)) + (1 - q) log((1 - q) / eps), q = sigma(beta h)

    Source: equation 16 of arXiv 2402.00856
    """
    chosen, rejected = p.logratios(f_divergence)
    logits = beta * (chosen - rejected)
    correct = logits.sigmoid() * (logsigmoid(logits) - math.log1p(-label_smoothing))
    return correct + (-logits).sigmoid() * (logsigmoid(-logits) - math.log(label_smoothing))


@preference_loss()
def nca_pair(p: Preferences, beta: float) -> Tensor:
    """Keeps the chosen response likely: rewards are absolute, not relative.

        -log sigma(beta r_w) - (log sigma(-beta r_w) + log sigma(-beta r_l)) / 2

    Source: arXiv 2402.05369
    """
    chosen, rejected = p.logratios()
    return -logsigmoid(beta * chosen) - (logsigmoid(-beta * chosen) + logsigmoid(-beta * rejected)) / 2


@preference_loss()
def bco_pair(p: Preferences, beta: float) -> Tensor:
    """BCO without its reward baseline, as in TRL: classifies each response as good or bad on its own.

        -log sigma(beta r_w) - log sigma(-beta r_l)

    Source: arXiv 2404.04656 with delta = 0
    """
    return bco(p, beta, reward_baseline=0.0)


@preference_loss()
def bco(p: Preferences, beta: float, reward_baseline: float) -> Tensor:
    """For labels of single responses: classifies each as good or bad against the mean reward of earlier steps.

        -log sigma(beta r_w - delta) - log sigma(delta - beta r_l), delta: mean of beta r over both sides

    Source: arXiv 2404.04656
    """
    chosen, rejected = p.logratios()
    return -logsigmoid(beta * chosen - reward_baseline) - logsigmoid(reward_baseline - beta * rejected)


@preference_loss()
def sppo_hard(p: Preferences, beta: float) -> Tensor:
    """Self-play: pulls the log-ratio of each response to a fixed value.

        (r_w - 1/(2 beta))^2 + (r_l + 1/(2 beta))^2

    Source: equation 4.7 of arXiv 2405.00675, with preferences of 0 and 1
    """
    chosen, rejected = p.logratios()
    return (chosen - 0.5 / beta).square() + (rejected + 0.5 / beta).square()


@preference_loss()
def apo_zero(p: Preferences, beta: float) -> Tensor:
    """For chosen responses better than the model's own: raises the chosen and lowers the rejected ones.

        1 - sigma(beta r_w) + sigma(beta r_l)

    Source: equation 7 of arXiv 2408.06266
    """
    chosen, rejected = p.logratios()
    return 1 - (beta * chosen).sigmoid() + (beta * rejected).sigmoid()


@preference_loss()
def apo_down(p: Preferences, beta: float) -> Tensor:
    """For chosen responses worse than the model's own: lowers both, the rejected ones more.

        sigma(beta r_w) + 1 - sigma(beta h)

    Source: equation 8 of arXiv 2408.06266
    """
    chosen, rejected = p.logratios()
    return (beta * chosen).sigmoid() + 1 - (beta * (chosen - rejected)).sigmoid()


@preference_loss()
def discopop(p: Preferences, beta: float, f_divergence: Divergence = reverse_kl, discopop_tau: float = 0.05) -> Tensor:
    """Discovered by a language model; between the logistic and the exponential loss.

        -(1 - s) log sigma(beta h) + s exp(-beta h), s = sigma(beta h / tau)

    Source: equation 5 of arXiv 2406.08414
    """
    chosen, rejected = p.logratios(f_divergence)
    logits = beta * (chosen - rejected)
    # s exp(-x) with both under one exponential: where exp(-x) is infinite, s is 0
    exponential = (logsigmoid(logits / discopop_tau) - logits).exp()
    return exponential - (-logits / discopop_tau).sigmoid() * logsigmoid(logits)


@preference_loss()
def plackett_luce(
    p: Preferences, beta: float, ranking_sizes: Sequence[int] | int, f_divergence: Divergence = reverse_kl
) -> Tensor:
    """For rankings of several answers: each is chosen among itself and all below it; of two answers it is sigmoid.

        log sum over j of exp(beta r_j) - beta r_w, j from w to the last; a ranking's loss is the sum over its pairs

    Source: appendix A.3 of arXiv 2305.18290
    """
    chosen, rejected = (beta * each for each in p.logratios(f_divergence))
    return -logsigmoid(chosen - logsumexp_onwards(rejected, ranking_sizes))


# ---- losses without a reference ---------------------------------------------------------------------------------


@preference_loss(reference=False)
def sft(p: Preferences) -> Tensor:
    """An addition to another loss that keeps chosen responses likely, as in sigmoid=1,sft=0.2.

        -log pi(y_w|x) / mean of |y_w| over the step, so that the loss of a step is the mean over its chosen tokens

    Source: the NLL term of arXiv 2404.19733, averaged as TRL has it
    """
    return -p.full_logps.chunk(2)[0] / p.mean_chosen_length


@preference_loss(reference=False, length_normalized=True)
def simpo(p: Preferences, beta: float, margins: Tensor, simpo_gamma: float = 0.5) -> Tensor:
    """Without a reference, by log-probs per token; the paper uses a beta of 2 to 10.

        -log sigma(beta (log pi(y_w|x)/|y_w| - log pi(y_l|x)/|y_l|) - gamma - m)

    Source: SimPO, equation 6 of arXiv 2405.14734
    """
    chosen, rejected = p.per_token(p.logps)
    return -logsigmoid(beta * (chosen - rejected) - simpo_gamma - margins)


@preference_loss(reference=False, length_normalized=True)
def orpo(p: Preferences, beta: float) -> Tensor:
    """Without a reference, for a base model that was not tuned yet: SFT and preference at once.

        sft - beta log sigma(log odds_w - log odds_l), odds = P/(1 - P), log P = log pi(y|x)/|y|

    Source: equations 6 and 7 of arXiv 2403.07691, whose lambda is beta here, as in TRL
    """
    chosen, rejected = (_log_odds(average) for average in p.per_token(p.logps))
    return sft(p) - beta * logsigmoid(chosen - rejected)


def _log_odds(logp: Tensor) -> Tensor:
    logp = logp.clamp(max=-1e-6)  # the odds of a certain token are infinite
    return logp - (-logp.expm1()).log()


@preference_loss(reference=False)
def cpo(p: Preferences, beta: float, margins: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Without a reference, first used for translation: DPO against a uniform reference, and SFT.

        sft - (1 - eps) log sigma(beta g - m) - eps log sigma(-beta g - m), g = log pi(y_w|x) - log pi(y_l|x)

    Source: arXiv 2401.08417
    """
    chosen, rejected = p.logps.chunk(2)
    return sft(p) + _smoothed_sigmoid(beta * (chosen - rejected), margins, label_smoothing)
