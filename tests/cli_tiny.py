"""For the tests of the command line: tiny models with tokenizers, a text, and calls."""

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import jsonschema
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvtune.cli import main

SCHEMAS = json.loads(Path(__file__).with_name("schemas").joinpath("cli.json").read_text())
POSITIONS = 1024
CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
# small enough for seconds, large enough that the window of 128 is left behind
SMALL = ("--sequences", "2", "--context", "256", "--continuation", "16")
QUICK = (*SMALL, "--template", "search-kivi", "--bytes-at", "1k")


class Said(NamedTuple):
    """What a call printed and how it ended."""

    code: int
    out: str
    err: str

    @property
    def told(self) -> str:
        """The error as one line, however the terminal would wrap it."""
        return " ".join(self.err.split())


def called(*words: str | Path) -> Said:
    """Returns what a call printed, for fixtures that outlive a test."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(word) for word in words])
    return Said(code, out.getvalue(), err.getvalue())


class Caller:
    """Calls kvtune as a shell would, in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: str | Path) -> Said:
        """Returns what a command line printed."""
        self._capsys.readouterr()
        code = main([str(word) for word in words])
        return Said(code, *self._capsys.readouterr())

    def json(self, *words: str | Path) -> dict[str, Any]:
        """Returns the one object of --json, held to the schema of its verb."""
        said = self(*words, "--json")
        found: dict[str, Any] = json.loads(said.out)
        verb = found["schema"].removeprefix("kvtune.").removesuffix("/1")
        jsonschema.validate(found, SCHEMAS["envelope"])
        whole = SCHEMAS["data"].get(verb, {"additionalProperties": False})
        if not found["ok"] and found["error"]["type"] != "GateError":
            # an error leaves out what was not reached, but adds nothing
            whole = {name: whole[name] for name in whole.keys() & {"properties", "type"}}
        jsonschema.validate(found["data"], {**whole, "$defs": SCHEMAS["$defs"]})
        assert said.code == (found["error"]["exit_code"] if found["error"] else 0)
        return found


@pytest.fixture
def kv(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Caller:
    """Calls kvtune; the hub is never asked."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return Caller(capsys)


def tiny(folder: Path, seed: int = 0) -> Path:
    """Saves a random two-layer Llama and its tokenizer."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(_topics(4), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    fast.chat_template = CHAT
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=POSITIONS,
        initializer_range=0.25,
        eos_token_id=None,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def text(file: Path) -> Path:
    """Writes enough prose for three roles."""
    file.write_text("\n\n".join(_topics(12)))
    return file


def _topics(count: int) -> list[str]:
    return [topics[name] for name in sorted(topics)[:count]]


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
