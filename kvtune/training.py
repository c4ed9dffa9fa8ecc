"""Training: tensors of codecs by gradient descent on the error of one layer's attention output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from kvtune_kernels import attend
from torch import Tensor

from kvtune.chains import Chain
from kvtune.fitted import sites
from kvtune.lessons import Lesson
from kvtune.pages import MakeSite
from kvtune.parts import Code, Site
from kvtune.policy import Policy
from kvtune.rope import Rope

WARM = 10  # steps until the rate is whole
RUN = 64  # queries that are answered together
SIDES = ("keys", "values")
Tensors = dict[str, Tensor]
Refit = Callable[
    [Tensors], Tensors
]  # what was trained -> all tensors, what lies behind fitted to it


@dataclass(frozen=True)
class Course:
    """How a layer is trained: Adam (arXiv:1412.6980), whose rate falls to nothing."""

    steps: int = 200
    rate: float = 0.01  # of a tensor's root mean square, each step
    queries: int = RUN  # of one sequence, each step
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Trained:
    """A layer's tensors, and what its codes cost by the lesson before and after, in nats."""

    tensors: Tensors
    before: float
    after: float


def names(layer: int, policy: Policy) -> Iterator[str]:
    """The tensors of a layer that training improves: "layer.3.keys.METHOD.NAME"."""
    for side in SIDES:
        chain: Chain = getattr(policy, side)
        for codec in chain.codecs:
            yield from (f"layer.{layer}.{side}.{codec.name()}.{name}" for name in codec.trains)


def train(
    layer: int,
    policy: Policy,
    start: Mapping[str, Tensor],
    lesson: Lesson,
    rope: Rope | None,
    course: Course = Course(),
    refit: Refit = dict,
) -> Trained:
    """Improves the tensors that a layer's codecs train, from those of their fit.

    Every step reads one sequence as the runtime would, its sinks and window exact and the rest
    through the chain, answers some queries, and weighs the error of what attention gives out. The
    layer's inputs are the dense model's, so layers do not wait for each other. What follows a
    trained codec, a quantiser say, is passed straight through (arXiv:1308.3432): the loss sees its
    errors, the gradient does not. What is not better in the end than the fit is not taken.
    """
    device = lesson.keys.device
    wanted = {name: start[name] for name in names(layer, policy)}
    moved = {name: x.to(device).float().requires_grad_() for name, x in wanted.items()}
    makers = sites(layer, rope, {**{name: x.to(device) for name, x in start.items()}, **moved})
    generator = torch.Generator().manual_seed((course.seed << 16) + layer)
    groups = [{"params": [x], "lr": course.rate * _size(x)} for x in moved.values()]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARM) * (1 - step / course.steps)
    )
    with torch.enable_grad():
        for _ in range(course.steps):
            row, first = _drawn(lesson, course.queries, generator)
            optimizer.zero_grad()
            cost(policy, makers, lesson, row, first, course.queries).backward()
            optimizer.step()
            schedule.step()
    found = {name: moved[name].detach().to(x) for name, x in wanted.items()}
    whole = {**start, **refit(found)}
    before, after = (judged(layer, policy, own, lesson, rope) for own in (start, whole))
    return Trained(whole, before, after) if after < before else Trained({**start}, before, before)


def _drawn(lesson: Lesson, queries: int, generator: torch.Generator) -> tuple[int, int]:
    """A sequence, and where in its queries a run of them begins."""
    rows, last = len(lesson.keys), max(0, lesson.query.shape[2] - queries)
    row, first = (int(torch.randint(n, (1,), generator=generator)) for n in (rows, last + 1))
    return row, first


def _size(x: Tensor) -> float:
    return float(x.detach().square().mean().sqrt().clamp_min(1e-6))


@torch.no_grad()
def judged(
    layer: int, policy: Policy, tensors: Mapping[str, Tensor], lesson: Lesson, rope: Rope | None
) -> float:
    """What a layer's codes cost by all queries of a lesson, in nats."""
    device = lesson.keys.device
    makers = sites(layer, rope, {name: x.to(device) for name, x in tensors.items()})
    count = lesson.query.shape[2]
    starts = range(0, count, RUN)
    total = sum(
        float(cost(policy, makers, lesson, row, first, RUN)) * min(RUN, count - first)
        for row in range(len(lesson.keys))
        for first in starts
    )
    return total / (len(lesson.keys) * count)


def cost(
    policy: Policy,
    makers: tuple[MakeSite, MakeSite],
    lesson: Lesson,
    row: int,
    first: int,
    count: int,
) -> Tensor:
    """What the error of a run of queries' outputs in one sequence costs, in nats: a scalar.

    The queries see sinks | pages | exact tokens, as the runtime reads them: what each reads from
    pages depends on its position alone.
    """
    query, exact_out = (
        x[row : row + 1, :, first : first + count] for x in (lesson.query, lesson.out)
    )
    at = lesson.positions[first : first + count]
    start, end = (policy.sinks + policy.due(int(p)) for p in (at[0], at[-1]))
    token = torch.arange(lesson.keys.shape[2], device=at.device)
    sinks, pages, recent = (
        token[part]
        for part in (slice(policy.sinks), slice(policy.sinks, end), slice(start, int(at[-1]) + 1))
    )
    keys, values = (
        torch.cat([x[:, :, sinks], _read(chain, x[:, :, pages], pages, maker), x[:, :, recent]], 2)
        for x, chain, maker in zip(
            (lesson.keys[row : row + 1], lesson.values[row : row + 1]),
            (policy.keys, policy.values),
            makers,
            strict=True,
        )
    )
    due = torch.tensor([policy.sinks + policy.due(p) for p in at.tolist()], device=at.device)
    seen = torch.cat(
        [
            sinks <= at[:, None],
            pages < due[:, None],
            (recent >= due[:, None]) & (recent <= at[:, None]),
        ],
        1,
    )
    out = attend(query, keys, values, seen, lesson.scale, lesson.softcap)
    change = (out - exact_out).transpose(1, 2).flatten(2)
    return (change @ lesson.root.to(change)).square().sum(-1).mean() / 2


def _read(chain: Chain, x: Tensor, positions: Tensor, make_site: MakeSite) -> Tensor:
    return rebuilt(chain, x, make_site(positions, x.dtype))


def rebuilt(chain: Chain, x: Tensor, site: Site) -> Tensor:
    """x [B, H, T, D], T whole blocks, as a chain gives it back: what `decode(encode(x))` is, with a
    gradient for the tensors of its codecs that train."""
    last = max((i for i, codec in enumerate(chain.codecs) if codec.trains), default=-1)
    if last < 0 or x.shape[2] == 0:
        with torch.no_grad():
            return chain.decode(chain.encode(x, site), site) if x.shape[2] else x
    sides = []
    for codec in chain.codecs[: last + 1]:
        x, side = codec.encode(x, site)
        sides.append(side)
    behind = Chain(chain.codecs[last + 1 :])
    with torch.no_grad():
        inside = replace(site, dtype=x.dtype)
        error = behind.decode(behind.encode(x, inside), inside) - x
    x = x + error
    for codec, side in zip(chain.codecs[last::-1], sides[::-1], strict=True):
        x = codec.decode(Code(x, side), site)
    return x
