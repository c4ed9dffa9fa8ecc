"""Laws of dispatch: which ops run as kernels, what is said about the others, how work is split."""

from __future__ import annotations

import warnings

import pytest
import torch
from kvtune_kernels import Format, Packed, encode, encode_into, implementation, launch, unsupported
from kvtune_kernels.launch import runs_triton, split_count

pytest.importorskip("triton")

CPU = torch.device("cpu")
CHANNEL, TOKEN = Format(4, 32, False), Format(4, 32, True)


def test_kernels_are_interpreted_where_there_is_no_gpu() -> None:
    """Else the other tests of this folder would not test kernels: see tests/conftest.py."""
    assert launch.interpreted() != torch.cuda.is_available()


@pytest.mark.parametrize("work", [1, 3, 8, 64, 132, 500, 4096])
@pytest.mark.parametrize("tiles", [1, 2, 7, 32, 512, 2048, 1 << 15])
@pytest.mark.parametrize("room", [8, 528, 1056])
def test_a_context_is_split_into_stretches_of_whole_pages(work: int, tiles: int, room: int) -> None:
    splits = split_count(work, tiles, room)
    assert 1 <= splits <= min(tiles, 256)
    assert splits == split_count(work, tiles, room)


@pytest.mark.parametrize("room", [8, 528, 1056])
def test_splitting_never_costs_more_steps_than_leaving_it(room: int) -> None:
    """A step is a page that all programs of a wave read at once."""

    def steps(work: int, tiles: int, splits: int) -> int:
        return -(-work * splits // room) * (-(-tiles // splits) + 2)

    for work in (1, 3, 8, 64, 132, 500, 4096):
        for tiles in (1, 2, 7, 32, 512, 2048):
            splits = split_count(work, tiles, room)
            assert steps(work, tiles, splits) <= steps(work, tiles, 1)


@pytest.mark.parametrize("work", [1, 8, 64, 200])
def test_a_long_context_fills_the_device(work: int) -> None:
    """Few heads are cut until at least three quarters of the device have work in every wave."""
    programs = work * split_count(work, 1 << 12, 528)
    assert programs / (528 * -(-programs // 528)) >= 0.75 or programs == 256 * work


def test_no_more_stretches_than_one_wave_holds_when_there_is_little_to_read() -> None:
    for work in (1, 2, 8, 64, 132):
        for tiles in (1, 4, 16):
            assert work * split_count(work, tiles, 528) <= 528


@pytest.mark.parametrize(
    ("dim", "dtype", "formats", "reason"),
    [
        (24, torch.bfloat16, [], "head_dim 24 is not a multiple of 16"),
        (320, torch.bfloat16, [], "head_dim 320 is not a multiple of 16 up to 256"),
        (64, torch.float32, [], "float32 is not a 16-bit dtype"),
        (64, torch.float64, [CHANNEL], "float64 is not a 16-bit dtype"),
        (96, torch.float16, [TOKEN, Format(4, 48, True)], "group 48 is no power of two"),
        (96, torch.float16, [Format(4, 96, False)], "group 96 is no power of two"),
        (80, torch.float16, [Format(3, 32, False)], "3 bits need a head_dim"),
        (80, torch.float16, [CHANNEL, Format(3, 80, True)], "multiple of 32, not 80"),
        (64, torch.float16, [Format(4, 64, False, 64)], "planes have affine codes of 2 bits"),
        (64, torch.float16, [Format(2, 64, True, 64)], "planes have affine codes of 2 bits"),
        (64, torch.float16, [Format(2, 64, False, 40)], "40 channels of planes are not a multiple"),
        (64, torch.float16, [Format(2, 64, False, 272)], "of 16 up to 256"),
        (64, torch.float16, [CHANNEL, Format(2, 64, False, 64)], "read of keys alone"),
        (64, torch.float16, [Format(2, 64, False, 0, True)], "symmetric codes are 2, 3 or 4 bits"),
        (64, torch.float16, [None, Format(8, 64, True, 0, True)], "2, 3 or 4 bits per token"),
        (96, torch.float16, [Format(2, 96, True, 0, True)], "head_dim of 64, 128 or 256, not 96"),
    ],
)
def test_what_kernels_cannot_do_has_a_reason(
    dim: int, dtype: torch.dtype, formats: list[Format], reason: str, device: torch.device
) -> None:
    said = unsupported(dim, dtype, device, *formats)
    assert said is not None and reason in said


@pytest.mark.parametrize("dim", [16, 64, 80, 96, 112, 128, 256])
def test_what_kernels_can_do_has_none(dim: int, device: torch.device) -> None:
    head = Format(2, dim, True)
    for dtype in (torch.bfloat16, torch.float16):
        assert unsupported(dim, dtype, device, CHANNEL, Format(8, 128, False), head) is None


def test_a_cpu_without_the_interpreter_and_a_machine_without_triton_run_no_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(launch, "interpreted", lambda: False)
        assert unsupported(64, torch.float16, CPU) == "kernels do not run on cpu"
    with monkeypatch.context() as patch:
        patch.setattr(launch, "triton", None)
        assert unsupported(64, torch.float16, CPU) == "Triton is not installed"


def test_the_slow_way_is_announced_once_and_right(device: torch.device) -> None:
    """Where a kernel was asked for and cannot run, the reference answers; the caller is named."""
    launch.say_once.cache_clear()
    x = torch.randn(1, 1, 64, 24, device=device).half()
    packed = Packed.empty(Format(4, 24, True), 1, 1, 64, 24, device)
    with implementation("triton"):
        with pytest.warns(UserWarning, match=r"plain torch: head_dim 24 .* up to 256\.") as said:
            encode_into(packed, x, 0, True)
        assert len(said) == 1 and said[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            encode_into(packed, x, 0, True)
    codes, meta = encode(x, packed.format, True)
    assert torch.equal(packed.codes, codes) and torch.equal(packed.meta, meta)


def test_nothing_is_said_where_the_reference_was_asked_for_or_is_usual() -> None:
    launch.say_once.cache_clear()
    for name in ("reference", "auto"):
        with implementation(name):
            assert not runs_triton(24, torch.float32, CPU)


def test_auto_means_kernels_on_a_gpu_alone(device: torch.device) -> None:
    asked = 64, torch.bfloat16, device, CHANNEL, TOKEN
    assert runs_triton(*asked) == (device.type == "cuda")
    with implementation("triton"):
        assert runs_triton(*asked)
    with implementation("reference"):
        assert not runs_triton(*asked)


def test_an_implementation_is_chosen_for_a_while() -> None:
    """Inner choices win, and end with their block whatever ended it."""
    asked = 64, torch.float16, CPU
    with implementation("reference"):
        with implementation("reference"), implementation("auto"):
            assert launch._choice.get() == "auto"
        with pytest.raises(ZeroDivisionError), implementation("auto"):
            raise ZeroDivisionError
        assert launch._choice.get() == "reference" and not runs_triton(*asked)
    assert launch._choice.get() == "auto"


def test_a_workspace_grows_and_is_kept(device: torch.device) -> None:
    workspace = launch.Workspace()
    assert workspace.nbytes == 0
    out, lse = workspace.partial(6, 64, device)
    assert (out.numel(), lse.numel(), workspace.nbytes) == (6 * 64, 6, 4 * 6 * 65)
    smaller, _ = workspace.partial(3, 64, device)
    assert smaller.data_ptr() == out.data_ptr() and workspace.nbytes == 4 * 6 * 65
    workspace.partial(12, 64, device)
    assert workspace.nbytes == 4 * 12 * 65
    assert torch.equal(workspace.lanes(device).cpu(), torch.arange(256).to(torch.uint8))


class Compiled:
    """What Triton hands back, as far as it is looked at."""

    def __init__(self, text: str) -> None:
        self.asm = {"ttgir": text}


MMA = "#ttg.nvidia_mma<{{versionMajor = {}, "
LANES = (
    'x = tt.elementwise_inline_asm "lop3" %a : tensor<8x8xi8, '
    "#ttg.dot_op<{{opIdx = 0, parent = #mma, kWidth = {}}}>> -> tensor<8x8xf16, #mma>\n"
)
LOADED = 'x = tt.elementwise_inline_asm "lop3" %a : tensor<8x8xi8, #blocked> -> tensor<8xf16, #b>\n'


def test_a_kernel_with_lanes_in_another_order_is_known_by_its_layouts() -> None:
    """Products of a warp group gave wrong numbers on a GPU, and no error."""
    launch.say_once.cache_clear()
    assert launch.in_order(Compiled(MMA.format(2) + LANES.format(4)))
    with pytest.warns(UserWarning, match="inline PTX"):
        assert not launch.in_order(Compiled(MMA.format(2) + MMA.format(3) + LANES.format(4)))
    assert not launch.in_order(Compiled(MMA.format(2) + LANES.format(2)))
    assert not launch.in_order(Compiled(""))
