"""The preference losses as pure functions, each with its use, its equation and its paper.

To add one is to add a function here: ``--loss``, its help, ``dpo losses`` and the table of docs/losses.md follow. What
a loss reads is what it names as parameters. torch is imported where it is needed, so that help does without it.

In the equations r = log pi(y|x)/ref(y|x), or what an f-divergence makes of that ratio, w and l are the chosen and the
rejected response, h = r_w - r_l, m is the pair's margin, eps the label smoothing and |y| the tokens that carry loss.

Legend: P pairs. Responses are ordered chosen first: ``logps[:P]`` chosen, ``logps[P:]`` rejected.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from dpo_cli.utils.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

Divergence = Callable[["Tensor"], "Tensor"]
OF_RUN = ("beta", "label_smoothing", "f_divergence")  # what a loss may read of a run's options, by their names
OF_PAIRS = ("margins", "shift")  # and of ``Preferences``


@dataclass(frozen=True)
class Preferences:
    """What a loss reads of P pairs.

    ``logps`` and ``ref_logps`` are those that responses are compared by, which LD-DPO discounts; ``whole`` are the
    policy's without that. ``tokens`` is the mean length of the step's chosen responses, ``shift`` the mean reward of
    earlier steps. ``weights`` multiply the losses.

    Shapes: ``logps``, ``ref_logps``, ``whole``, ``lengths`` (2P,); ``margins`` and ``weights`` (P,) or one for all.
    Units: nats; ``lengths`` and ``tokens`` in tokens that carry loss.
    """

    logps: Tensor
    ref_logps: Tensor
    lengths: Tensor
    whole: Tensor
    tokens: float
    margins: Tensor | float = 0.0
    weights: Tensor | float = 1.0
    shift: float = 0.0

    def logratios(self, f_divergence: Divergence = lambda ratios: ratios) -> tuple[Tensor, Tensor]:
        """r of the chosen and of the rejected responses: (P,) each."""
        chosen, rejected = f_divergence(self.logps - self.ref_logps).chunk(2)
        return chosen, rejected

    def averages(self, of: Tensor) -> tuple[Tensor, Tensor]:
        """Something of the responses (2P,) a token of theirs: (P,) each."""
        chosen, rejected = (of / self.lengths).chunk(2)
        return chosen, rejected


@dataclass(frozen=True)
class Loss:
    """A loss, and what is told of it. ``reads``: its parameters, with their defaults.

    ``reference``: whether it reads the reference; ``couples``: whether a pair's loss depends on the other pairs of the
    step; ``averaged``: whether its reward is a token's.
    """

    name: str
    compute: Callable[..., Tensor]
    use: str
    formula: str
    paper: str
    reads: Mapping[str, Any]
    reference: bool = True
    couples: bool = False
    averaged: bool = False

    @property
    def options(self) -> dict[str, float]:
        """The options that are its own, with their defaults."""
        return {name: default for name, default in self.reads.items() if name not in OF_RUN + OF_PAIRS}


LOSSES: dict[str, Loss] = {}


def preference_loss(**about: bool) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Make a function a loss that ``--loss`` knows by its name. ``about``: see ``Loss``.

    Its docstring has three paragraphs: when to use it, the equation, the source.

    Shapes: its ``Preferences`` are of P pairs -> (P,).
    """

    def add(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
        use, formula, paper = (" ".join(part.split()) for part in inspect.cleandoc(compute.__doc__ or "").split("\n\n"))
        _, *parameters = inspect.signature(compute).parameters.values()
        reads = MappingProxyType({each.name: each.default for each in parameters})
        name = compute.__name__
        LOSSES[name] = Loss(name, compute, use, formula, paper.removeprefix("Source: "), reads, **about)
        return compute

    return add


def _log_sigmoid(x: Tensor) -> Tensor:
    import torch.nn.functional as F

    return F.logsigmoid(x)


def _smoothed(gained: Tensor, margins: Tensor | float, eps: float) -> Tensor:
    """The logistic loss of what was gained beyond the margins, at labels of which a share eps is flipped.

    To exchange the two responses is to exchange eps and 1 - eps, and a label that says nothing (eps = 1/2) pulls to no
    side.
    """
    right, flipped = _of_labels(gained, margins)
    return -(1 - eps) * right - eps * flipped


def _of_labels(gained: Tensor, margins: Tensor | float) -> tuple[Tensor, Tensor]:
    """Log-likelihoods of a right label and of a flipped one: the rejected response is better, by the same margin."""
    return _log_sigmoid(gained - margins), _log_sigmoid(-gained - margins)


# ---- f-divergences ----------------------------------------------------------------------------------------------
# f'(u) of the ratio u = pi/ref, by log u, as of table 1 of arXiv 2309.16240; a constant that all have is left out.


def reverse_kl(logratios: Tensor) -> Tensor:
    """log u."""
    return logratios


def forward_kl(logratios: Tensor) -> Tensor:
    """1 - 1/u: the alpha-divergence of alpha = 0."""
    return alpha_divergence(logratios, 0.0)


def js_divergence(logratios: Tensor) -> Tensor:
    """log(2u / (1 + u))."""
    return math.log(2) + _log_sigmoid(logratios)


def alpha_divergence(logratios: Tensor, alpha: float = 0.5) -> Tensor:
    """(u^(alpha - 1) - 1) / (alpha - 1), with which ratios of more than e^80 are no longer told apart."""
    power = alpha - 1
    return logratios if abs(power) < 1e-6 else ((power * logratios).clamp(max=80).exp() - 1) / power


DIVERGENCES = {each.__name__: each for each in (reverse_kl, forward_kl, js_divergence, alpha_divergence)}


def divergence(text: str) -> Divergence:
    """What ``--f-divergence`` names.

    Raises:
        ValueError: it names none.
    """
    name, given, alpha = text.partition("=")
    if name not in DIVERGENCES or (given and name != "alpha_divergence") or (given and not math.isfinite(float(alpha))):
        raise ValueError(text)
    return partial(alpha_divergence, alpha=float(alpha)) if given else DIVERGENCES[name]


# ---- losses that are held against the reference -----------------------------------------------------------------


@preference_loss()
def sigmoid(
    p: Preferences, beta: float, margins: Tensor, label_smoothing: float = 0.0, f_divergence: Divergence = reverse_kl
) -> Tensor:
    """DPO, to begin with; with label smoothing where labels may be flipped (conservative DPO).

        -(1 - eps) log sigma(beta h - m) - eps log sigma(-beta h - m)

    Source: equation 7 of arXiv 2305.18290; eps after https://ericmitchell.ai/cdpo.pdf; m of arXiv 2402.10571
    """
    chosen, rejected = p.logratios(f_divergence)
    return _smoothed(beta * (chosen - rejected), margins, label_smoothing)


@preference_loss()
def robust(
    p: Preferences, beta: float, margins: Tensor, label_smoothing: float = 0.0, f_divergence: Divergence = reverse_kl
) -> Tensor:
    """Where a known share eps of the labels is flipped: on average the loss of clean ones.

        (-(1 - eps) log sigma(beta h - m) + eps log sigma(-beta h - m)) / (1 - 2 eps)

    Source: arXiv 2403.00409
    """
    chosen, rejected = p.logratios(f_divergence)
    right, flipped = _of_labels(beta * (chosen - rejected), margins)
    return ((label_smoothing - 1) * right + label_smoothing * flipped) / (1 - 2 * label_smoothing)


@preference_loss()
def sigmoid_norm(p: Preferences, beta: float, f_divergence: Divergence = reverse_kl) -> Tensor:
    """Where responses grow long: log-ratios a token, with a beta that is as many times larger as responses are long.

        -log sigma(beta (r_w/|y_w| - r_l/|y_l|))

    Source: length-normalised DPO, as in arXiv 2411.15124
    """
    chosen, rejected = p.averages(f_divergence(p.logps - p.ref_logps))
    return -_log_sigmoid(beta * (chosen - rejected))


@preference_loss()
def hinge(p: Preferences, beta: float, margins: Tensor, f_divergence: Divergence = reverse_kl) -> Tensor:
    """Where pairs that are far enough apart should pull no more.

        max(0, 1 + m - beta h)

    Source: SLiC, arXiv 2305.10425; of log-ratios in arXiv 2309.06657
    """
    chosen, rejected = p.logratios(f_divergence)
    return (1 + margins - beta * (chosen - rejected)).relu()


@preference_loss()
def ipo(p: Preferences, beta: float, f_divergence: Divergence = reverse_kl) -> Tensor:
    """Where DPO overfits: pulls the difference a token to a fixed value, from both sides.

        (r_w/|y_w| - r_l/|y_l| - 1/(2 beta))^2

    Source: equation 17 of arXiv 2310.12036, averaged over tokens as its authors confirmed to TRL
    """
    chosen, rejected = p.averages(f_divergence(p.logps - p.ref_logps))
    return (chosen - rejected - 1 / (2 * beta)).square()


@preference_loss()
def dpop(
    p: Preferences, beta: float, margins: Tensor, label_smoothing: float = 0.0, dpop_lambda: float = 50.0
) -> Tensor:
    """Where responses of a pair are alike (edits, sums) and DPO makes the chosen one rarer: a penalty on that.

        -log sigma(beta (h - lambda max(0, -r_w)) - m)

    Source: DPO-Positive, arXiv 2402.13228
    """
    chosen, rejected = p.logratios()
    return _smoothed(beta * (chosen - rejected - dpop_lambda * (-chosen).relu()), margins, label_smoothing)


@preference_loss()
def exo_pair(p: Preferences, beta: float, label_smoothing: float, f_divergence: Divergence = reverse_kl) -> Tensor:
    """Mode-seeking where DPO covers all modes; needs eps > 0, of which the paper takes 0.001.

        q log(q / (1 - eps)) + (1 - q) log((1 - q) / eps), q = sigma(beta h)

    Source: equation 16 of arXiv 2402.00856
    """
    chosen, rejected = p.logratios(f_divergence)
    gained = beta * (chosen - rejected)
    right = gained.sigmoid() * (_log_sigmoid(gained) - math.log1p(-label_smoothing))
    return right + (-gained).sigmoid() * (_log_sigmoid(-gained) - math.log(label_smoothing))


@preference_loss()
def nca_pair(p: Preferences, beta: float) -> Tensor:
    """Where the chosen response should not become rarer: rewards are absolute, not relative.

        -log sigma(beta r_w) - (log sigma(-beta r_w) + log sigma(-beta r_l)) / 2

    Source: arXiv 2402.05369
    """
    chosen, rejected = p.logratios()
    return -_log_sigmoid(beta * chosen) - (_log_sigmoid(-beta * chosen) + _log_sigmoid(-beta * rejected)) / 2


@preference_loss()
def bco_pair(p: Preferences, beta: float) -> Tensor:
    """BCO without its shift, as TRL has it: each response is judged good or bad on its own.

        -log sigma(beta r_w) - log sigma(-beta r_l)

    Source: arXiv 2404.04656 with delta = 0
    """
    return bco(p, beta, shift=0.0)


@preference_loss()
def bco(p: Preferences, beta: float, shift: float) -> Tensor:
    """Where labels are more of single responses than of pairs: good or bad, against the mean reward of earlier steps.

        -log sigma(beta r_w - delta) - log sigma(delta - beta r_l), delta: mean of beta r over both sides

    Source: arXiv 2404.04656
    """
    chosen, rejected = p.logratios()
    return -_log_sigmoid(beta * chosen - shift) - _log_sigmoid(shift - beta * rejected)


@preference_loss()
def sppo_hard(p: Preferences, beta: float) -> Tensor:
    """Self-play: each response's log-ratio is pulled to a fixed value.

        (r_w - 1/(2 beta))^2 + (r_l + 1/(2 beta))^2

    Source: equation 4.7 of arXiv 2405.00675, with preferences of 0 and 1
    """
    chosen, rejected = p.logratios()
    return (chosen - 0.5 / beta).square() + (rejected + 0.5 / beta).square()


@preference_loss()
def apo_zero(p: Preferences, beta: float) -> Tensor:
    """Where chosen responses are better than what the model says: they are to become likelier, rejected ones rarer.

        1 - sigma(beta r_w) + sigma(beta r_l)

    Source: equation 7 of arXiv 2408.06266
    """
    chosen, rejected = p.logratios()
    return 1 - (beta * chosen).sigmoid() + (beta * rejected).sigmoid()


@preference_loss()
def apo_down(p: Preferences, beta: float) -> Tensor:
    """Where the model says better than chosen responses: both are to become rarer, rejected ones more.

        sigma(beta r_w) + 1 - sigma(beta h)

    Source: equation 8 of arXiv 2408.06266
    """
    chosen, rejected = p.logratios()
    return (beta * chosen).sigmoid() + 1 - (beta * (chosen - rejected)).sigmoid()


@preference_loss()
def discopop(p: Preferences, beta: float, f_divergence: Divergence = reverse_kl, discopop_tau: float = 0.05) -> Tensor:
    """A loss that a language model found, between the logistic and the exponential one.

        -(1 - s) log sigma(beta h) + s exp(-beta h), s = sigma(beta h / tau)

    Source: equation 5 of arXiv 2406.08414
    """
    chosen, rejected = p.logratios(f_divergence)
    gained = beta * (chosen - rejected)
    # s exp(-x) with both under one exponential: where exp(-x) is infinite, s is 0
    exponential = (_log_sigmoid(gained / discopop_tau) - gained).exp()
    return exponential - (-gained / discopop_tau).sigmoid() * _log_sigmoid(gained)


@preference_loss(couples=True)
def aot(p: Preferences, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Where all gaps of a step should beat the reference's as distributions: the k-th smallest is held against its own.

        -(1 - eps) log sigma(beta d_k) - eps log sigma(-beta d_k), d_k: k-th smallest gap less that of the reference

    Source: arXiv 2406.05882 (alignment by optimal transport, of pairs)
    """
    (chosen, rejected), (ref_chosen, ref_rejected) = p.logps.chunk(2), p.ref_logps.chunk(2)
    gaps, order = (chosen - rejected).sort()
    losses = _smoothed(beta * (gaps - (ref_chosen - ref_rejected).sort().values), 0.0, label_smoothing)
    return losses[order.argsort()]  # to the pair whose gap it is


@preference_loss(couples=True)
def aot_unpaired(p: Preferences, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """The same where responses are not really paired: the k-th smallest chosen reward against the k-th rejected one.

        -(1 - eps) log sigma(beta d_k) - eps log sigma(-beta d_k), d_k: k-th smallest r_w less k-th smallest r_l

    Source: arXiv 2406.05882 (unpaired)
    """
    chosen, rejected = p.logratios()
    ratios, order = chosen.sort()
    losses = _smoothed(beta * (ratios - rejected.sort().values), 0.0, label_smoothing)
    return losses[order.argsort()]  # to the pair whose chosen response it is


# ---- losses without a reference ---------------------------------------------------------------------------------


@preference_loss(reference=False)
def sft(p: Preferences) -> Tensor:
    """To add to another one where chosen responses should not become rarer, as in sigmoid=1,sft=0.2.

        -log pi(y_w|x) / mean of |y_w| over the step, so that the step's loss is the mean over its chosen tokens

    Source: the NLL term of arXiv 2404.19733, averaged as TRL has it
    """
    return -p.whole.chunk(2)[0] / p.tokens


@preference_loss(reference=False, averaged=True)
def simpo(p: Preferences, beta: float, margins: Tensor, simpo_gamma: float = 0.5) -> Tensor:
    """Without a reference, by log-probs a token; the paper takes a beta of 2 to 10.

        -log sigma(beta (log pi(y_w|x)/|y_w| - log pi(y_l|x)/|y_l|) - gamma - m)

    Source: SimPO, equation 6 of arXiv 2405.14734
    """
    chosen, rejected = p.averages(p.logps)
    return -_log_sigmoid(beta * (chosen - rejected) - simpo_gamma - margins)


@preference_loss(reference=False, averaged=True)
def orpo(p: Preferences, beta: float) -> Tensor:
    """Without a reference, from a base model that is not tuned yet: SFT and preference at once.

        sft - beta log sigma(log odds_w - log odds_l), odds = P/(1 - P), log P = log pi(y|x)/|y|

    Source: equations 6 and 7 of arXiv 2403.07691, whose lambda is beta here, as in TRL
    """
    chosen, rejected = (_log_odds(average) for average in p.averages(p.logps))
    return sft(p) - beta * _log_sigmoid(chosen - rejected)


def _log_odds(logp: Tensor) -> Tensor:
    logp = logp.clamp(max=-1e-6)  # of a certain token they are infinite
    return logp - (-logp.expm1()).log()


@preference_loss(reference=False)
def cpo(p: Preferences, beta: float, margins: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Without a reference, as for translation: DPO against a uniform reference, and SFT.

        sft - (1 - eps) log sigma(beta g - m) - eps log sigma(-beta g - m), g = log pi(y_w|x) - log pi(y_l|x)

    Source: arXiv 2401.08417
    """
    chosen, rejected = p.logps.chunk(2)
    return sft(p) + _smoothed(beta * (chosen - rejected), margins, label_smoothing)


# ---- what a run minimises ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Objective:
    """What a run minimises: losses, each times its weight, and what they read of the run's options."""

    terms: Mapping[str, float] = field(default_factory=lambda: {"sigmoid": 1.0})
    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence: str = "reverse_kl"
    ld_alpha: float | None = None  # LD-DPO: weight of the tokens beyond the shorter response's length
    wpo: bool = False  # WPO: pairs are weighted by how likely the policy itself finds their responses
    options: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, p: Preferences) -> Tensor:
        """Loss of each pair: (P,)."""
        parts = [self.terms[loss.name] * loss.compute(p, **self._given(loss, p)) for loss in self.losses]
        return p.weights * sum(parts[1:], parts[0])

    def _given(self, loss: Loss, p: Preferences) -> dict[str, Any]:
        known: dict[str, Any] = {name: getattr(p, name) for name in OF_PAIRS} | dict(self.options)
        known |= {"beta": self.beta, "label_smoothing": self.label_smoothing}
        known["f_divergence"] = divergence(self.f_divergence)
        return {name: known[name] for name in loss.reads if name in known}

    @property
    def losses(self) -> list[Loss]:
        """Those that it is a sum of."""
        return [LOSSES[name] for name in self.terms]

    @property
    def name(self) -> str:
        """As ``--loss`` has it."""
        return ",".join(n if list(self.terms.values()) == [1] else f"{n}={w:g}" for n, w in self.terms.items())

    @property
    def plain(self) -> bool:
        """Whether its loss is ln 2 where policy and reference are equal, whatever the pairs are."""
        return self.name == "sigmoid" and not self.wpo

    @property
    def reference(self) -> bool:
        """Whether it reads the reference."""
        return any(loss.reference for loss in self.losses)

    @property
    def couples(self) -> bool:
        """Whether a pair's loss depends on the other pairs of its step."""
        return any(loss.couples for loss in self.losses)

    @property
    def averaged(self) -> bool:
        """Whether rewards are a token's: those of a loss without a reference that has them so."""
        return not self.reference and any(loss.averaged for loss in self.losses)

    @property
    def by_tokens(self) -> bool:
        """Whether it reads more of the responses than their log-probs."""
        return self.wpo or self.ld_alpha is not None

    def reads(self, name: str) -> bool:
        """Whether a loss of it has this parameter."""
        return any(name in loss.reads for loss in self.losses)

    def ignored_by(self, name: str) -> str | None:
        """The first loss of it that does not read this parameter; sft, which compares nothing, counts only alone."""
        compare = [loss for loss in self.losses if loss.name != "sft"] or self.losses
        return next((loss.name for loss in compare if name not in loss.reads), None)


DPO = Objective()


def listed() -> dict[str, Any]:
    """`dpo losses`: all that is told of each loss."""
    return {"losses": [_about(loss) for loss in LOSSES.values()]}


def _about(loss: Loss) -> dict[str, Any]:
    told: dict[str, Any] = {"name": loss.name, "use": loss.use, "formula": loss.formula, "paper": loss.paper}
    told |= {"reads": [name for name in loss.reads if name not in ("shift", *loss.options)]}
    return told | {"options": loss.options, "reference": loss.reference}


def as_text(result: Mapping[str, Any]) -> str:
    """What a person reads: four lines a loss."""
    lines = [
        "r = log pi(y|x)/ref(y|x), w chosen, l rejected, h = r_w - r_l, m a pair's margin, eps --label-smoothing",
        "Several are added up by weight: --loss sigmoid=1,sft=0.2",
    ]
    for each in result["losses"]:
        own = "".join(f"  --loss-options {name}={value:g}" for name, value in each["options"].items())
        flags = "".join(f"  --{name.replace('_', '-')}" for name in each["reads"] if name in OF_RUN)
        lines += ["", f"{each['name']}{'' if each['reference'] else '  (no reference)'}", f"  {each['use']}"]
        lines += [f"  {each['formula']}", f"  {each['paper']}", f"  reads{flags + own or '  no option'}"]
    return "\n".join(lines)


def objective_of(
    loss: str = "sigmoid",
    loss_options: str | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence: str = "reverse_kl",
    ld_alpha: float | None = None,
    wpo: bool = False,
) -> Objective:
    """The objective that the options of these names ask for.

    Raises:
        UsageError: a loss or an option of one is not known, or one is given that would be ignored.
    """
    made = Objective(_terms(loss), beta, label_smoothing, f_divergence, ld_alpha, wpo, _numbers(loss_options))
    own = {name for each in made.losses for name in each.options}
    for name in made.options.keys() - own:
        others = f"it has {', '.join(sorted(own))}" if own else "it has none of its own"
        raise UsageError(f"--loss-options {name}: --loss {made.name} does not read it; {others}")
    if wrong := [name for name, value in made.options.items() if value < 0]:
        raise UsageError(f"--loss-options {loss_options}: {wrong[0]} must be 0 or greater")
    if made.options.get("discopop_tau") == 0:
        raise UsageError(f"--loss-options {loss_options}: discopop_tau divides, so 0 is none; take a small one")
    for each in made.losses:
        if each.reads.get("label_smoothing") is inspect.Parameter.empty and not label_smoothing:
            raise UsageError(f"--loss {each.name}: needs --label-smoothing above 0, for example 0.001")
    about = {f"--f-divergence {f_divergence}": f_divergence != "reverse_kl"}
    about[f"--ld-alpha {ld_alpha}"] = ld_alpha is not None
    if not made.reference and (given := [option for option, is_given in about.items() if is_given]):
        raise UsageError(f"{given[0]}: is about the ratio to the reference, and --loss {made.name} reads none")
    if label_smoothing and (ignoring := made.ignored_by("label_smoothing")):
        told = f"--loss {ignoring} does not read it; {_that('label_smoothing')}"
        raise UsageError(f"--label-smoothing {label_smoothing}: {told}")
    if f_divergence != "reverse_kl" and (ignoring := made.ignored_by("f_divergence")):
        told = f"--loss {ignoring} has no other than reverse_kl; {_that('f_divergence')}"
        raise UsageError(f"--f-divergence {f_divergence}: {told}")
    if wpo and made.couples:
        raise UsageError(f"--wpo: --loss {made.name} sorts the responses of a step, so that no pair is left to weight")
    return made


def _that(parameter: str) -> str:
    return "those that do: " + ", ".join(name for name, loss in LOSSES.items() if parameter in loss.reads)


def _terms(text: str) -> dict[str, float]:
    """``sigmoid`` or ``sigmoid=1,sft=0.2`` as weights by name."""
    terms: dict[str, float] = {}
    for part in text.split(","):
        name, given, weight = (word.strip() for word in part.partition("="))
        if name not in LOSSES:
            near = did_you_mean(name.replace("-", "_"), LOSSES) or f"; there are {', '.join(LOSSES)}"
            raise UsageError(f"--loss {text}: no loss is called '{name}'{near}")
        if name in terms:
            raise UsageError(f"--loss {text}: {name} is there twice; add up its weights")
        terms[name] = _number(f"--loss {text}", weight) if given else 1.0
        if not terms[name] > 0:
            raise UsageError(f"--loss {text}: a weight must be greater than 0")
    return terms


def _numbers(text: str | None) -> dict[str, float]:
    """``name=number,name=number`` by name."""
    found: dict[str, float] = {}
    for part in text.split(",") if text else []:
        name, _, number = (word.strip() for word in part.partition("="))
        if name in found:
            raise UsageError(f"--loss-options {text}: {name} is there twice")
        found[name] = _number(f"--loss-options {text}", number)
    return found


def _number(where: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"{where}: '{text}' is no number; write NAME=NUMBER, with commas between")
    return number
