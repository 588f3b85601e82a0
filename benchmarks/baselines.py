# SPDX-License-Identifier: Apache-2.0
"""Two MeZO step loops in plain Transformers + PEFT, to measure the engine against.

Both compute one step of Algorithm 1 in MeZO (arXiv 2305.17333): perturb by
+eps z and -eps z, take the difference of two losses, and move along z. The loss
is the paper's for classification: cross-entropy over the options of an example,
the score of an option being the mean log-probability of its tokens. In exact
arithmetic they do the same; they differ in how much work they spend on it.

``OfficialStyleMezo`` works as the authors' code (princeton-nlp/MeZO) does.
``StrongMezo`` is the fastest loop that we know how to write without an engine.

Shape names: B examples, O options, R rows of the padded forward, T tokens of a
row, H hidden size, V vocabulary, D trainable parameters.
"""

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn


class Example(Protocol):
    """A classification example in token ids, as every loop here takes it."""

    prompt: list[int]
    options: list[list[int]]  # each at least one token
    label: int  # index of the gold option


def build_peft_model(
    model: nn.Module,
    tuning: str,
    r: int,
    lora_alpha: float,
    target_modules: Sequence[str],
    invocation_tokens: Sequence[int] = (),
) -> nn.Module:
    """A causal LM with a trainable adapter in the model's own dtype.

    ``tuning``: "lora", "alora" (arXiv 2504.12397), whose adapter acts from the
    last occurrence of ``invocation_tokens`` onward, or "full": the model itself.
    """
    if tuning not in ("lora", "alora", "full"):
        raise ValueError(f"tuning={tuning!r}; one of 'lora', 'alora', 'full'")
    if (tuning == "alora") != bool(invocation_tokens):
        raise ValueError("invocation_tokens go with tuning='alora', and only with it")
    if tuning == "full":
        return model.eval()
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=lora_alpha,
        target_modules=list(target_modules),
        alora_invocation_tokens=list(invocation_tokens) or None,
    )
    return get_peft_model(model, config, autocast_adapter_dtype=False).eval()


class _MezoLoop:
    """What the two loops share: the estimate, the seeds, the trainable parameters.

    A loop owns the adapter of its model: do not train one model by two loops.
    """

    def __init__(
        self, model: nn.Module, *, zo_eps: float, learning_rate: float, seed: int, pad_token_id: int = 0
    ) -> None:
        self.model = model.eval()
        self.zo_eps = zo_eps
        self.learning_rate = learning_rate
        self.pad_token_id = pad_token_id
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.device = self.params[0].device
        self._seeds = np.random.default_rng(seed)

    def next_seed(self) -> int:
        return int(self._seeds.integers(10**9))

    def projected_grad(self, loss_plus: float, loss_minus: float) -> float:
        """The directional derivative along z: Definition 1 of the paper."""
        return (loss_plus - loss_minus) / (2 * self.zo_eps)

    def _generator(self, zo_random_seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(zo_random_seed)

    def _normal_like(self, param: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return torch.randn(param.shape, generator=generator, dtype=param.dtype, device=self.device)


class OfficialStyleMezo(_MezoLoop):
    """A step as the authors' code computes it.

    One padded row for every option of every example, logits and log-softmax at
    all positions, in the dtype of the model; the parameters are perturbed in
    place, and z is drawn anew from its seed each of the four times it is used.
    """

    PAD_TO_MULTIPLE_OF = 8

    @torch.inference_mode()
    def step(self, batch: Sequence[Example]) -> tuple[float, float, float]:
        """(loss_plus, loss_minus, projected_grad), after the update."""
        inputs = self._collate(batch)
        zo_random_seed = self.next_seed()
        self._perturb(zo_random_seed, +1)
        loss_plus = self._loss(batch, *inputs)
        self._perturb(zo_random_seed, -2)
        loss_minus = self._loss(batch, *inputs)
        self._perturb(zo_random_seed, +1)
        projected_grad = self.projected_grad(loss_plus, loss_minus)
        self._update(zo_random_seed, projected_grad)
        return loss_plus, loss_minus, projected_grad

    def _perturb(self, zo_random_seed: int, scale: float) -> None:
        generator = self._generator(zo_random_seed)
        for param in self.params:
            z = self._normal_like(param, generator)
            param.add_(z, alpha=scale * self.zo_eps)

    def _update(self, zo_random_seed: int, projected_grad: float) -> None:
        generator = self._generator(zo_random_seed)
        for param in self.params:
            z = self._normal_like(param, generator)
            param.sub_(z, alpha=self.learning_rate * projected_grad)

    def _collate(self, batch: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Left-padded [R, T] ids, their mask, and the [R, T] mask of the options."""
        pairs = [(e.prompt, option) for e in batch for option in e.options]
        longest = max(len(prompt) + len(option) for prompt, option in pairs)
        width = -(-longest // self.PAD_TO_MULTIPLE_OF) * self.PAD_TO_MULTIPLE_OF
        ids, mask, scored = [], [], []
        for prompt, option in pairs:
            length = len(prompt) + len(option)
            pads = width - length
            ids.append([self.pad_token_id] * pads + prompt + option)
            mask.append([0] * pads + [1] * length)
            scored.append([0] * (width - len(option)) + [1] * len(option))
        return tuple(torch.tensor(x, device=self.device) for x in (ids, mask, scored))

    def _loss(self, batch, ids, mask, scored) -> float:
        """Mean over the batch of the cross-entropy over an example's options."""
        logits = self.model(ids, attention_mask=mask, use_cache=False).logits
        logprobs = F.log_softmax(logits[:, :-1], dim=-1)
        taken = logprobs.gather(-1, ids[:, 1:, None])[..., 0]
        scored = scored[:, 1:]
        scores = (taken * scored).sum(-1) / scored.sum(-1)
        losses = [
            F.cross_entropy(options, torch.tensor(example.label, device=self.device))
            for example, options in zip(batch, scores.split([len(e.options) for e in batch]), strict=True)
        ]
        return torch.stack(losses).mean().item()


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What one forward of ``StrongMezo`` runs over, and where its scores come from.

    S scored states are read off the rows; N option tokens are read off the
    states; options are numbered example by example, with room for the same
    number in each.
    """

    ids: torch.Tensor  # [R, T], padded on the right
    alora_offsets: list[int | None] | None  # per row, as PEFT counts: from the end
    row: torch.Tensor  # [S] row of a scored state
    position: torch.Tensor  # [S] its position in the row
    state: torch.Tensor  # [N] scored state that predicts an option token
    token: torch.Tensor  # [N] the option token
    option: torch.Tensor  # [N] the option that it belongs to
    lengths: torch.Tensor  # [B * O] tokens of an option, as float; 0 for no option
    labels: torch.Tensor  # [B]


class StrongMezo(_MezoLoop):
    """A step with as little work as a padded forward allows.

    - An example whose options are all one token is one row, and its options are
      read off one state; otherwise each of its options is a row.
    - Rows are padded on the right: a causal model then needs no mask, and the
      attention kernel takes its causal path.
    - The head is applied to the scored states only.
    - z is drawn once; the parameters are views of one flat vector, so that a
      perturbation is one addition, made from an fp32 master copy.
    """

    def __init__(self, model: nn.Module, **kwargs) -> None:
        super().__init__(model, **kwargs)
        adapted = isinstance(model, PeftModel)
        base = model.get_base_model() if adapted else model
        self.body, self.head = base.model, base.get_output_embeddings()
        self.invocation = model.active_peft_config.alora_invocation_tokens if adapted else None
        flat = [param.detach().flatten() for param in self.params]
        self.master = torch.cat(flat).float()
        self.live = torch.cat(flat)
        offset = 0
        for param in self.params:
            end = offset + param.numel()
            param.data = self.live[offset:end].view_as(param)
            offset = end

    @torch.inference_mode()
    def step(self, batch: Sequence[Example]) -> tuple[float, float, float]:
        """(loss_plus, loss_minus, projected_grad), after the update."""
        plan = self._plan(batch)
        z = self._direction(self.next_seed())
        torch.add(self.master, z, alpha=self.zo_eps, out=self.live)
        loss_plus = self._loss(plan)
        torch.sub(self.master, z, alpha=self.zo_eps, out=self.live)
        loss_minus = self._loss(plan)
        projected_grad = self.projected_grad(loss_plus, loss_minus)
        self.master.sub_(z, alpha=self.learning_rate * projected_grad)
        self.live.copy_(self.master)
        return loss_plus, loss_minus, projected_grad

    def _direction(self, zo_random_seed: int) -> torch.Tensor:
        """[D] standard normal, one parameter after the other."""
        generator = self._generator(zo_random_seed)
        draws = [self._normal_like(param, generator) for param in self.params]
        return torch.cat([z.flatten() for z in draws]).float()

    def _plan(self, batch: Sequence[Example]) -> _Plan:
        room = max(len(example.options) for example in batch)
        rows: list[list[int]] = []
        states: dict[tuple[int, int], int] = {}
        reads: list[tuple[int, int, int]] = []  # (state, token, option)
        for i, example in enumerate(batch):
            shared = all(len(option) == 1 for option in example.options)
            for j, option in enumerate(example.options):
                if j == 0 or not shared:
                    rows.append(example.prompt + option[:-1])
                for k, token in enumerate(option):
                    place = (len(rows) - 1, len(example.prompt) - 1 + k)
                    state = states.setdefault(place, len(states))
                    reads.append((state, token, i * room + j))
        width = max(map(len, rows))
        padded = [row + [self.pad_token_id] * (width - len(row)) for row in rows]
        row, position, state, token, option = (
            torch.tensor(column, device=self.device) for column in (*zip(*states), *zip(*reads))
        )
        return _Plan(
            ids=torch.tensor(padded, device=self.device),
            alora_offsets=self._alora_offsets(rows, width),
            row=row,
            position=position,
            state=state,
            token=token,
            option=option,
            lengths=torch.bincount(option, minlength=room * len(batch)).float(),
            labels=torch.tensor([e.label for e in batch], device=self.device),
        )

    def _alora_offsets(self, rows: list[list[int]], width: int) -> list[int | None] | None:
        """Positions from the invocation to the padded end, searched for in the
        row itself: padding must not pass for an invocation."""
        if self.invocation is None:
            return None
        starts = [_rfind(row, self.invocation) for row in rows]
        return [None if start is None else width - start for start in starts]

    def _loss(self, plan: _Plan) -> float:
        """Mean over the batch of the cross-entropy over an example's options."""
        # PeftModel.forward does just this around the whole model, head included.
        hooks = (
            self.model._enable_peft_forward_hooks(alora_offsets=plan.alora_offsets)
            if isinstance(self.model, PeftModel)
            else nullcontext()
        )
        with hooks:
            hidden = self.body(plan.ids, use_cache=False).last_hidden_state
        logits = self.head(hidden[plan.row, plan.position])  # [S, V]
        logprobs = F.log_softmax(logits.float(), dim=-1)
        taken = logprobs[plan.state, plan.token]  # [N]
        sums = torch.zeros_like(plan.lengths).index_add_(0, plan.option, taken)
        # An example with fewer options has places of length 0: they score -inf.
        scores = torch.where(plan.lengths > 0, sums / plan.lengths, -torch.inf)
        return F.cross_entropy(scores.view(len(plan.labels), -1), plan.labels).item()


def _rfind(tokens: list[int], pattern: list[int]) -> int | None:
    """Start of the last occurrence of ``pattern``, or None."""
    for start in range(len(tokens) - len(pattern), -1, -1):
        if tokens[start : start + len(pattern)] == pattern:
            return start
    return None
