"""What a reader of the training step has to walk: own frames and functions up to the first ``loss.backward()``.

``python -m benchmarks.step_trace`` trains a tiny model for a step and prints the counts.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

import dpo_cli
from dpo_cli.training.step import Trainer

PACKAGE = str(Path(dpo_cli.__file__).parent)


@dataclass
class Trace:
    """The call stack at the first backward pass, outermost first, and the functions that the step called before it."""

    frames: list[str] = field(default_factory=list)
    functions: list[str] = field(default_factory=list)
    done: bool = False

    def files(self, names: list[str]) -> list[str]:
        """The files of some functions, each once."""
        return list(dict.fromkeys(name.partition(":")[0] for name in names))

    def as_dict(self) -> dict[str, Any]:
        return {
            "frames": self.frames,
            "frame_files": self.files(self.frames),
            "functions": self.functions,
            "function_files": self.files(self.functions),
        }


def _name(code: CodeType) -> str | None:
    """``file:function`` of the package's own code; comprehensions belong to the function around them."""
    if not code.co_filename.startswith(PACKAGE) or code.co_name in ("<listcomp>", "<genexpr>", "<dictcomp>"):
        return None
    return f"{Path(code.co_filename).relative_to(PACKAGE)}:{code.co_qualname}"


@contextmanager
def traced() -> Iterator[Trace]:
    """Trace the first step that is taken within the block."""
    trace, step, backward = Trace(), Trainer.step, torch.Tensor.backward

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and (name := _name(frame.f_code)) and name not in trace.functions:
            trace.functions.append(name)

    def traced_step(*arguments: Any) -> Any:
        if not trace.done:
            sys.setprofile(profile)
        return step(*arguments)

    def traced_backward(tensor: torch.Tensor, *arguments: Any, **more: Any) -> None:
        if not trace.done and trace.functions:
            sys.setprofile(None)
            trace.done, frame = True, sys._getframe(1)
            while frame is not None:
                if name := _name(frame.f_code):
                    trace.frames.insert(0, name)
                frame = frame.f_back  # type: ignore[assignment]
        backward(tensor, *arguments, **more)

    Trainer.step, torch.Tensor.backward = traced_step, traced_backward  # type: ignore[method-assign, assignment]
    try:
        yield trace
    finally:
        sys.setprofile(None)
        Trainer.step, torch.Tensor.backward = step, backward  # type: ignore[method-assign]


def main() -> None:
    from dpo_cli.cli.app import main as dpo
    from tests.helpers import SAMPLE, make_model, make_tokenizer

    with tempfile.TemporaryDirectory() as folder, traced() as trace:
        make_model().save_pretrained(Path(folder, "model"))
        make_tokenizer().save_pretrained(Path(folder, "model"))
        about = {"model": "model", "output": "run", "cache-dir": "cache"}
        words = [word for name, path in about.items() for word in (f"--{name}", str(Path(folder, path)))]
        sys.argv = ["dpo", "train", "--data", str(SAMPLE / "train.jsonl"), "--max-steps", "1", "--quiet", *words]
        try:
            dpo()
        except SystemExit as error:
            assert not error.code, error.code
    found = trace.as_dict()
    print(json.dumps(found | {name: len(values) for name, values in found.items()}))
    print("\n".join([*trace.frames, "", *trace.functions]), file=sys.stderr)


if __name__ == "__main__":
    main()
