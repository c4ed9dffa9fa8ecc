"""Laws of attention to low-rank keys: a kernel answers as float32 attention to the keys."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from kvtune_kernels import attend, implementation, latents_launch, launch
from kvtune_kernels.latents_launch import attend_latents, paired_basis, pieces, unsupported_latents
from kvtune_kernels.latents_reference import Rotary
from torch import Tensor

pytest.importorskip("triton")

GPU = torch.cuda.is_available()
LONG = 1999 if GPU else 133
NEAR = 0.006  # of an answer's norm


def rotary(
    width: int, tabled: bool, device: torch.device, interleaved: bool = False, factor: float = 1.0
) -> Rotary:
    """RoPE of base 10,000, as a table or as frequencies."""
    frequency = 10000.0 ** -(torch.arange(0, width, 2, device=device) / width)
    if not tabled:
        return Rotary(width, frequency=frequency, factor=factor, interleaved=interleaved)
    angle = torch.arange(3 * LONG, device=device)[:, None] * frequency
    return Rotary.of(angle.cos() * factor, angle.sin() * factor, width, interleaved)


def given(
    device: torch.device, rank: int = 48, dim: int = 64, heads: int = 2, share: int = 2,
    tokens: int = LONG, batch: int = 2, dtype: torch.dtype = torch.bfloat16, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """Random arguments of `attend_latents`, of which `more` replaces some."""
    generator = torch.Generator().manual_seed(rank + dim)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype).to(device)

    return {
        "query": random(batch, heads * share, dim),
        "latents": random(batch, tokens, rank),
        "up": (random(heads, rank, dim) / rank**0.5).to(dtype),
        "values": random(batch, heads, tokens, dim),
        "rotary": rotary(dim, False, device),
    } | more


def chosen(batch: int, heads: int, tokens: int, count: int, device: torch.device) -> Tensor:
    """Different tokens of each row and head, in no order."""
    generator = torch.Generator().manual_seed(1)
    found = torch.rand(batch, heads, tokens, generator=generator).argsort(-1)[..., :count]
    return found.int().to(device)


def check(arguments: dict[str, Any], near: float = NEAR) -> tuple[Tensor, Tensor]:
    """The kernel's answer, which is the twin's."""
    with implementation("reference"):
        true, true_lse = attend_latents(**arguments)
    with implementation("triton"):
        out, lse = attend_latents(**arguments)
    assert out.shape == true.shape and out.dtype == true.dtype
    assert float((out.float() - true.float()).norm()) <= near * float(true.float().norm())
    torch.testing.assert_close(lse, true_lse, atol=3e-3, rtol=1e-3)
    return out, lse


@pytest.mark.parametrize("tabled", [False, True])
@pytest.mark.parametrize(("dim", "share"), [(64, 1), (64, 8), (128, 4), (256, 2), (80, 3)])
def test_all_tokens_are_read_at_any_head_and_sharing(
    dim: int, share: int, tabled: bool, device: torch.device
) -> None:
    check(given(device, dim=dim, share=share, rotary=rotary(dim, tabled, device)))


@pytest.mark.parametrize("rank", [16, 32, 80, 160, 240, 512])
def test_ranks_of_whole_sixteens_are_read(rank: int, device: torch.device) -> None:
    """240 is padded, 512 is walked through in pieces."""
    check(given(device, rank=rank, dim=128 if rank == 512 else 64, tokens=77))


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 200])
def test_tokens_fill_no_whole_tiles(tokens: int, device: torch.device) -> None:
    check(given(device, tokens=tokens))


@pytest.mark.parametrize("counted", ["none", "rows", "heads"])
@pytest.mark.parametrize("tabled", [False, True])
def test_each_head_reads_its_own_tokens_at_their_true_positions(
    tabled: bool, counted: str, device: torch.device
) -> None:
    index = chosen(2, 2, LONG, 70, device)
    counts = {"none": None, "rows": [66, 3], "heads": [[70, 1], [0, 65]]}[counted]
    start = torch.tensor([5, LONG], device=device)
    found = given(device, index=index, start=start, rotary=rotary(64, tabled, device))
    if counts is not None:
        found["counts"] = torch.tensor(counts, dtype=torch.int32, device=device)
    out, lse = check(found)
    if counted == "heads":
        assert (out[1, :2] == 0).all() and (lse[1, :2] == -math.inf).all()


def test_rows_without_any_tokens_answer_nothing(device: torch.device) -> None:
    counts = torch.zeros(2, 2, dtype=torch.int32, device=device)
    index = chosen(2, 2, LONG, 1, device)
    out, lse = check(given(device, index=index, counts=counts))
    assert (out == 0).all() and (lse == -math.inf).all()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("tabled", [False, True])
@pytest.mark.parametrize("width", [32, 64])
def test_some_channels_turn_in_either_convention(
    width: int, tabled: bool, interleaved: bool, device: torch.device
) -> None:
    check(given(device, rotary=rotary(width, tabled, device, interleaved, factor=1.2)))


def test_keys_without_an_embedding_are_read(device: torch.device) -> None:
    check(given(device, rotary=None))


@pytest.mark.parametrize("rows", [False, True])
def test_bases_and_means_may_be_of_each_row(rows: bool, device: torch.device) -> None:
    found = given(device)
    size = (2, 2) if rows else (2,)
    generator = torch.Generator().manual_seed(0)
    found["up"] = (torch.randn(*size, 48, 64, generator=generator) / 7).bfloat16().to(device)
    found["mean"] = torch.randn(*size, 64, generator=generator).bfloat16().to(device)
    check(found)


def test_latents_and_values_may_belong_to_groups_of_heads(device: torch.device) -> None:
    found = given(device, heads=4)
    found["latents"] = torch.randn(2, 2, LONG, 48, device=device).bfloat16()
    found["values"] = found["values"][:, :2]
    check(found)


def test_a_paired_basis_is_the_same_basis(device: torch.device) -> None:
    found = given(device)
    paired = found | {"up": paired_basis(found["up"], found["rotary"]), "paired": True}
    for name in ("reference", "triton"):
        with implementation(name):
            one, other = attend_latents(**found), attend_latents(**paired)
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_values_may_be_bytes_with_a_scale_for_each_token(device: torch.device) -> None:
    found = given(device)
    found["values"] = torch.randint(-127, 128, (2, 2, LONG, 64), dtype=torch.int8, device=device)
    found["value_scales"] = torch.rand(2, 2, LONG, device=device).half() / 100
    check(found)


def test_without_values_the_log_sum_exp_alone_is_told(device: torch.device) -> None:
    out, lse = check(given(device, values=None))
    assert out.shape == (2, 4, 0) and bool(lse.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensors_may_be_strided(dtype: torch.dtype, device: torch.device) -> None:
    found = given(device, dtype=dtype, tokens=90)
    wide = torch.full((2, 2, 95, 100), torch.nan, dtype=dtype, device=device)
    wide[0, :, :90, 8:56] = found["latents"]
    found["latents"] = wide[0, :, :90, 8:56]
    values = found["values"].transpose(1, 2).contiguous().transpose(1, 2)
    query = found["query"].repeat_interleave(2, -1)[..., ::2]
    check(found | {"values": values, "query": query})


def test_absorbed_queries_meet_latents_as_keys(device: torch.device) -> None:
    """(q up^T) a = q (up^T a), and values as latents come back by their own way."""
    found = given(device, rotary=None, tokens=90, dtype=torch.float16)
    query, up = found["query"].float().unflatten(1, (2, 2)), found["up"].float()
    asked = (query @ up.transpose(-1, -2)).flatten(1, 2).half()
    own = torch.randn(2, 90, 32, device=device).half()
    absorbed = {"query": asked, "latents": found["latents"], "up": None, "values": own}
    out, lse = check(absorbed | {"scale": 64**-0.5})
    keys = found["latents"].float()[:, None] @ up
    back = torch.randn(2, 32, 64, device=device) / 6
    true = attend(found["query"].float()[:, :, None], keys, own.float()[:, None] @ back)[:, :, 0]
    raised = (out.float().unflatten(1, (2, 2)) @ back).flatten(1, 2)
    assert float((raised - true).norm() / true.norm()) < NEAR
    assert bool(lse.isfinite().all())


def test_selected_exact_tokens_are_latents_without_a_basis(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (
        torch.randn(2, heads, tokens, 64, generator=generator).bfloat16().to(device)
        for heads, tokens in ((4, 1), (2, 120), (2, 120))
    )
    index = chosen(2, 2, 120, 40, device)
    out, _ = check(
        {"query": query[:, :, 0], "latents": keys, "up": None, "values": values, "index": index}
    )
    place = index.long()[..., None].expand(-1, -1, -1, 64)
    some = (x.float().gather(2, place) for x in (keys, values))
    true = attend(query.float(), *some)[:, :, 0]
    assert float((out.float() - true).norm() / true.norm()) < NEAR


def test_two_stretches_meet_in_the_softmax(device: torch.device) -> None:
    found = given(device, tokens=100)
    whole, lse = check(found)
    parts = []
    with implementation("triton"):
        for low, high in ((0, 30), (30, 100)):
            cut = {"latents": found["latents"][:, low:high]}
            cut["values"] = found["values"][:, :, low:high]
            parts.append(attend_latents(**found | cut, start=low))
    weights = torch.stack([part for _, part in parts]).softmax(0)
    joined = sum(w[..., None] * out.float() for w, (out, _) in zip(weights, parts, strict=True))
    assert isinstance(joined, Tensor)
    assert float((joined - whole.float()).norm() / whole.float().norm()) < NEAR
    together = torch.stack([part for _, part in parts]).logsumexp(0)
    torch.testing.assert_close(together, lse, atol=3e-3, rtol=1e-3)


def test_the_twin_is_attention_to_rotated_keys(device: torch.device) -> None:
    """By the formula of rotate-half, written out."""
    found = given(device, dtype=torch.float32, share=1, tokens=20)
    keys = found["latents"][:, None] @ found["up"]
    angle = torch.arange(20, device=device)[:, None] * found["rotary"].frequency
    cos, sin = (torch.cat([x, x], -1) for x in (angle.cos(), angle.sin()))
    turned = keys * cos + torch.cat([-keys[..., 32:], keys[..., :32]], -1) * sin
    true = attend(found["query"][:, :, None], turned, found["values"])[:, :, 0]
    with implementation("reference"):
        out, _ = attend_latents(**found)
    torch.testing.assert_close(out, true)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rank": 24}, "rank 24 is not a multiple of 16"),
        ({"rank": 528}, "rank 528 is not a multiple of 16 up to 512"),
        ({"dim": 40}, "head_dim 40"),
        ({"dtype": torch.float32}, "float32 is not a 16-bit dtype"),
        ({"values": torch.zeros(2, 2, LONG, 24).half()}, "values of 24 channels"),
        ({"values": torch.zeros(2, 2, LONG, 32)}, "float32 values are of neither"),
        ({"up": torch.zeros(2, 48, 64)}, "not of a 16-bit dtype"),
    ],
)
def test_what_the_kernel_cannot_read_is_read_by_its_twin_and_said_once(
    change: dict[str, Any], reason: str, device: torch.device
) -> None:
    launch.say_once.cache_clear()
    found = given(device, **change)
    found = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in found.items()}
    four = (found[name] for name in ("query", "latents", "up", "values"))
    assert reason in str(unsupported_latents(*four))
    with implementation("triton"):
        with pytest.warns(UserWarning, match=r"low-rank keys in plain torch: .*\.") as said:
            attend_latents(**found)
        assert len(said) == 1 and reason in str(said[0].message)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            attend_latents(**found)


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"latents": torch.zeros(2, LONG, 32).half()}, "rank 32 meet 48"),
        ({"query": torch.zeros(2, 4, 32).half()}, "64 channels meets queries of 32"),
        ({"query": torch.zeros(2, 5, 64).half()}, "5 query heads are no multiple of 2"),
        ({"values": torch.zeros(2, 2, 9, 64).half()}, "do not have the 2 rows and tokens"),
        ({"latents": torch.zeros(2, 3, LONG, 48).half()}, "no multiple of 3 groups of latents"),
        ({"rotary": Rotary(64)}, "needs a table or frequencies"),
        ({"rotary": Rotary(96, frequency=torch.ones(48))}, "96 channels cannot turn"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: dict[str, Any], wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        attend_latents(**given(torch.device("cpu"), **change))


def test_a_rank_is_a_power_of_two_and_a_rest() -> None:
    assert [pieces(rank) for rank in (16, 96, 160, 176, 512)] == [
        (16, 16),
        (64, 32),
        (128, 32),
        (128, 64),
        (512, 16),
    ]


class Compiled:
    """What Triton hands back, as far as it is looked at."""

    def __init__(self, text: str) -> None:
        self.asm = {"ttgir": text}


TURN = 'x = tt.elementwise_inline_asm "" {{packed_element = 2 : i32}} %k -> tensor<64x64xf16, {}>\n'


def test_channels_that_are_not_side_by_side_are_noticed() -> None:
    launch.say_once.cache_clear()
    layouts = "#mma = #ttg.nvidia_mma<{versionMajor = 3}>\n#blocked = #ttg.blocked<{}>\n"
    assert latents_launch.in_pairs(Compiled(layouts + TURN.format("#mma")))
    assert latents_launch.in_pairs(Compiled(layouts))
    with pytest.warns(UserWarning, match="inline PTX"):
        assert not latents_launch.in_pairs(Compiled(layouts + TURN.format("#blocked")))
