"""`dpo explain`: one row as it would be trained, token by token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.text import Text

from dpo_cli.config.options import ExplainOptions
from dpo_cli.data.pairs import Pair, model_input_ids
from dpo_cli.data.rows import BadRow, Row, read_rows
from dpo_cli.data.sources import find_sources
from dpo_cli.data.tokenize import Encoder
from dpo_cli.training.prepare import choose_model, choose_tokenizer
from dpo_cli.training.run_dir import reading_as_trained
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.errors import RowError, UsageError, printable

STYLES = {"prompt": "dim", "chosen": "green", "rejected": "red"}


def explain(options: ExplainOptions, reporter: Reporter) -> dict[str, Any]:
    """Tokenize one row as training would; a refused row has its reason instead of tokens.

    Raises:
        UsageError: the model or the data cannot be read, or there is no such row.
    """
    source = choose_model(options.model, options, reporter, base=options.base_model)
    tokenizer, reading = choose_tokenizer(source, options), reading_as_trained(options, source)
    row = _find(options)
    if isinstance(row, BadRow):
        return {"row": row.where, "refused": row.reason}
    encoder = Encoder(tokenizer, reading)
    row = encoder.chat.as_turns(row)
    about: dict[str, Any] = {"row": row.where, "format": row.format}
    try:
        pair, notes = encoder.pair(row)
    except RowError as error:
        return about | {"refused": str(error)}
    about |= {"weight": pair.weight, "margin": pair.margin, "max_length": reading.max_length, "notes": sorted(notes)}
    return about | {part: _side(pair, part, tokenizer) for part in STYLES}


def _find(options: ExplainOptions) -> Row | BadRow:
    """Find the row by its number, or by file and number."""
    wanted = options.row
    for row in read_rows(find_sources(options.data), options.columns, options.format):
        place = row.where.partition(" (id ")[0]
        if wanted in (None, place, place.rpartition(":")[2].removeprefix("row ")):
            return row
    raise UsageError(f"--row {wanted}: {', '.join(options.data)} has no such row; name it as in pairs.jsonl:12")


def _side(pair: Pair, part: str, tokenizer: Any) -> dict[str, Any]:
    """Return a part's text and its tokens: id, text, whether it carries loss, and whether it is BOS or EOS."""
    ids = getattr(pair, part)
    special = {tokenizer.eos_token_id: "EOS", tokenizer.bos_token_id: "BOS"}
    tokens = [
        {
            "id": int(each),
            "text": tokenizer.decode([each], clean_up_tokenization_spaces=False),
            "loss": part != "prompt" and bool(stored >= 0),
            "special": special.get(int(each)),
        }
        for each, stored in zip(model_input_ids(ids), ids, strict=True)
    ]
    return {"text": tokenizer.decode(model_input_ids(ids), clean_up_tokenization_spaces=False), "tokens": tokens}


def show(result: dict[str, Any]) -> None:
    """Print the result to stdout: facts, the three texts, and one line per token."""
    console = Console(highlight=False, soft_wrap=True)
    for name, text in _facts(result):
        console.print(Text(printable(f"{name:<12}{text}")))
    if "refused" in result:
        return
    for part, style in STYLES.items():
        console.print(Text(printable(f"\n[{part}] {result[part]['text']}"), style))
    console.print(Text(f"\n{'part':<10}{'loss':<6}{'id':>8}  token"))
    for part, style in STYLES.items():
        for token in result[part]["tokens"]:
            line = f"{part:<10}{'loss' if token['loss'] else '':<6}{token['id']:>8}  {token['text']!r}"
            marked = f"{line}  {token['special']}" if token["special"] else line
            console.print(Text(printable(marked), style if token["loss"] else "dim"))


def _facts(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield from ((name, result[name]) for name in ("row", "format", "refused") if name in result)
    if "refused" in result:
        return
    for part in STYLES:
        tokens = result[part]["tokens"]
        loss = sum(token["loss"] for token in tokens)
        yield part, f"{len(tokens)} tokens" + (f", {loss} carry loss" if part != "prompt" else "")
    if (result["weight"], result["margin"]) != (1, 0):
        yield "terms", f"weight {result['weight']:g}, margin {result['margin']:g}"
    yield from (("note", note) for note in result["notes"])
