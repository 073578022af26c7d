"""What a process that tests fork has at its start: the libraries are imported, so that a command begins at once."""

import gc

import pydantic
import transformers.models.llama.modeling_llama
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import dpo_cli.cli.app
import dpo_cli.training.loop
import tests.helpers.faults

__all__ = ["dpo_cli", "pydantic", "tests", "transformers"]

_ = pydantic.TypeAdapter  # imported when it is asked for, which typer does in each command
get_checkpoint_conversion_mapping("llama")  # builds a table once
gc.collect()
gc.freeze()  # no collection walks through the libraries again
