"""`dpo explain`: one row as it would be trained, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from dpo_cli.config.options import ExplainOptions
from dpo_cli.data.pairs import model_input_ids
from dpo_cli.data.rows import BadRow, Row, read_rows
from dpo_cli.data.sources import find_sources
from dpo_cli.data.tokenize import Encoder
from dpo_cli.training.prepare import choose_model, choose_tokenizer
from dpo_cli.training.run_dir import encoder_options, row_options
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.errors import UsageError, printable

STYLES = {"prompt": "dim", "chosen": "green", "rejected": "red"}


def explain(options: ExplainOptions, reporter: Reporter) -> dict[str, Any]:
    """Tokenize one row as training would; a refused row has its reason instead of tokens.

    Raises:
        UsageError: the model or the data cannot be read, or there is no such row.
    """
    source = choose_model(options.model, options, reporter, base=options.base_model)
    tokenizer = choose_tokenizer(source, options)
    encoder = Encoder(tokenizer, **encoder_options(options, source.run))
    made = next(encoder.pairs([_find(options, source.run)]))
    if isinstance(made, BadRow):
        return {"row": made.where} | ({"format": made.format} if made.format else {}) | {"refused": made.reason}
    row, pairs, notes = made
    about: dict[str, Any] = {"row": row.where, "format": row.format, "weight": row.weight}
    names, parts = [*row.sides], {"prompt": pairs[0].prompt}
    both = [(names[better], names[worse]) for better, worse in row.preferences()]
    for pair, (chosen, rejected) in zip(pairs, both, strict=True):
        parts |= {chosen: pair.chosen, rejected: pair.rejected}
    if len(pairs) == 1:
        about["margin"] = pairs[0].margin
    else:
        columns = ("chosen", "rejected", "margin")
        rows = ((*sides, pair.margin) for sides, pair in zip(both, pairs, strict=True))
        about["pairs"] = [dict(zip(columns, each, strict=True)) for each in rows]
    about |= {"max_length": encoder.max_length, "notes": sorted(notes)}
    special = {tokenizer.eos_token_id: "EOS", tokenizer.bos_token_id: "BOS"}
    for part in ("prompt", *names):
        ids = parts[part]
        tokens = [
            {
                "id": token,
                "text": tokenizer.decode([token], clean_up_tokenization_spaces=False),
                "loss": part != "prompt" and bool(stored >= 0),
                "special": special.get(token),
            }
            for token, stored in zip(model_input_ids(ids).tolist(), ids, strict=True)
        ]
        text = tokenizer.decode(model_input_ids(ids), clean_up_tokenization_spaces=False)
        about[part] = {"text": text, "tokens": tokens}
    return about


def _find(options: ExplainOptions, run: Path | None) -> Row | BadRow:
    """Find the row by its number, or by file and number."""
    wanted, reading, count = options.row, row_options(options, run), 0
    for row in read_rows(find_sources(options.data), options.columns, options.format, **reading):
        place = row.where.partition(" (id ")[0]
        if wanted in (None, place, place.rpartition(":")[2].removeprefix("row ")):
            return row
        count += 1
    of = f"{', '.join(options.data)} has no such row of its {count:,}"
    raise UsageError(f"--row {wanted}: {of}; name it by its number, or as pairs.jsonl:12")


def show(result: dict[str, Any]) -> None:
    """Print the result to stdout: facts, the texts, and one line per token."""
    console = Console(highlight=False, soft_wrap=True)

    def line(text: str, style: str = "") -> None:
        console.print(Text(printable(text), style))

    for name in ("row", "format", "refused", "weight", "margin"):
        if name in result:
            line(f"{name:<12}{result[name]}")
    if "refused" in result:
        return
    for each in result.get("pairs", ()):
        line(f"{'pair':<12}{each['chosen']} over {each['rejected']}, margin {each['margin']:g}")
    for note in result["notes"]:
        line(f"{'note':<12}{note}")
    styles = {part: STYLES.get(part, "yellow") for part, value in result.items() if isinstance(value, dict)}
    for part, style in styles.items():
        line(f"\n[{part}] {result[part]['text']}", style)
    line(f"\n{'part':<10}{'loss':<6}{'id':>8}  token")
    for part, style in styles.items():
        for token in result[part]["tokens"]:
            loss, special = "loss" if token["loss"] else "", token["special"] or ""
            text = f"{part:<10}{loss:<6}{token['id']:>8}  {token['text']!r}  {special}".rstrip()
            line(text, style if token["loss"] else "dim")
