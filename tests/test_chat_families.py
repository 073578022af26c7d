"""Rows under the real chat templates of many families: what is asked, what carries loss, what is noted or refused.

What is expected is written by hand from the templates' sources: ``FAMILIES`` says how each writes a turn, ``CASES`` of
which turns a row is made. Nothing of it comes from the program. The templates are the copies that TRL brings; two that
it has not are written here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AddedToken, PreTrainedTokenizerFast

from dpo_cli.data.rows import BadRow, Reading, read_rows
from dpo_cli.data.sources import find_sources
from dpo_cli.data.tokenize import Encoder
from dpo_cli.utils.errors import RowError
from tests.conftest import ROOT, make_tokenizer, write_rows

Record = dict[str, Any]

# As Mistral 7B v0.3: the system's text and the tools stand before the last user's turn, the system's only where nothing
# follows it; an answer begins with a space; ids of calls have nine characters; text beside a call is passed over.
MISTRAL = r"""
{%- set own = namespace(system='', users=[]) -%}
{%- if messages[0].role == 'system' -%}
  {%- set own.system = messages[0].content + '\n\n' -%}{%- set messages = messages[1:] -%}
{%- endif -%}
{%- for each in messages if each.role == 'user' -%}{%- set own.users = own.users + [each] -%}{%- endfor -%}
{{- bos_token -}}
{%- for each in messages -%}
  {%- if each.role == 'user' -%}
    {%- if tools and each == own.users[-1] -%}
      {{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' -}}
    {%- endif -%}
    {{- '[INST] ' + (own.system if loop.last else '') + each.content + '[/INST]' -}}
  {%- elif each.tool_calls -%}
    {{- '[TOOL_CALLS] [' -}}
    {%- for call in each.tool_calls -%}
      {%- if call.id | default('') | length != 9 -%}{{- raise_exception('call ids are nine characters') -}}{%- endif -%}
      {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' + (']' if loop.last else ', ') -}}
    {%- endfor -%}
    {{- eos_token -}}
  {%- elif each.role == 'assistant' -%}
    {{- ' ' + each.content | trim + eos_token -}}
  {%- elif each.role in ('tool', 'tool_results') -%}
    {%- if each.tool_call_id | default('') | length != 9 -%}
      {{- raise_exception('call ids are nine characters') -}}
    {%- endif -%}
    {{- '[TOOL_RESULTS] {"content": ' + each.content + ', "call_id": "' + each.tool_call_id + '"}[/TOOL_RESULTS]' -}}
  {%- else -%}
    {{- raise_exception('of users, assistants and tools only') -}}
  {%- endif -%}
{%- endfor -%}
"""
# As OLMo 3 Think: a prompt opens <think>, which the template knows nowhere else; tools are in the role environment, and
# roles that it does not know are passed over; calls are a text beside the content.
OLMO = r"""
{%- for each in messages -%}
  {%- if each.role in ('system', 'user', 'environment') -%}
    {{- '<|im_start|>' + each.role + '\n' + each.content + '<|im_end|>\n' -}}
  {%- elif each.role == 'assistant' -%}
    {{- '<|im_start|>assistant\n' + (each.content or '') -}}
    {%- if each.function_calls -%}{{- '<function_calls>' + each.function_calls + '</function_calls>' -}}{%- endif -%}
    {{- eos_token if loop.last else '<|im_end|>\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n<think>' -}}{%- endif -%}
"""


# ---- how each family writes a turn ------------------------------------------------------------------------------

Arguments = dict[str, Any]


def as_json(given: Arguments) -> str:
    return json.dumps(given, ensure_ascii=False)


def as_parameters(given: Arguments) -> str:
    return "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in given.items())


def as_tags(given: Arguments) -> str:
    shown = {key: "null" if value is None else value for key, value in given.items()}
    return "".join(f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n" for key, value in shown.items())


def as_gemma(given: Arguments) -> str:
    shown = {key: "null" if value is None else f'<|"|>{value}<|"|>' for key, value in given.items()}
    return ",".join(f"{key}:{value}" for key, value in sorted(shown.items()))


@dataclass(frozen=True)
class Family:
    """How a template writes what a case has; ``%s`` stands for the text, the name or the arguments, in their order."""

    template: str  # a file of TRL's, or the source
    special: str
    eos: str
    opening: str  # what a generation prompt ends with, behind the user's turn
    ending: str  # of an answer
    user_end: str = ""  # between the user's text and the opening
    next_user: str = ""  # before a later user's text
    added: str = ""
    bos: str | None = None
    adds_bos: bool = False
    system: str = "%s"  # how a system message is written, up to its end
    answer: str = "%s"  # without reasoning
    thought: str | None = None  # reasoning, answer; None: the reasoning is left out
    inline: str | None = None  # the same where it stood as <think> in the content; None: as in ``thought``
    closed: str | None = None  # the same where only </think> stood there; None: as in ``inline``
    call: str | None = None  # name, arguments: the whole of a call; None: written as JSON into the answer's text
    arguments: Callable[[Arguments], str] = as_json
    beside: str | None = None  # text, name, arguments, where it differs from the text, a line end and the call
    several: str | None = None  # name, arguments, name, arguments
    earlier: str = ""  # an earlier answer with its opening and ending
    called: str = ""  # an earlier call: name, arguments
    result: str = ""  # what a tool gave, and what is behind it up to the answer
    shows_tools: bool = True
    thoughtless: str | None = None  # the opening where enable_thinking is false, if that is another
    refused: dict[str, str] = field(default_factory=dict)  # what is refused by it: cases, and with which words
    notes: tuple[str, ...] = ()  # on every row
    joins_lines: bool = True  # two line ends are one token, which may merge across the end of a prompt
    note_thoughtless: bool = False  # where an answer has no reasoning


LEFT_OUT = "reasoning that the chat template leaves out"
WRITTEN = "tool calls are written into an answer's text"
NO_TOOLS = "tools the chat template does not show"
EMPTY = "without reasoning, closed by"
LAST_USER = "system message begins the last user turn"
MASKED = "turns after the prompt that carry no loss"
MERGED = "boundary moved back"
INLINE = "<think>\n%s\n</think>\n\n%s"
CLOSED = "%s\n</think>\n\n%s"
IM = "<|im_start|> <|im_end|> <|endoftext|> <|object_ref_start|>"
QWEN_CALL = '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>'
XML_CALL = "<tool_call>\n<function=%s>\n%s</function>\n</tool_call>"
QWEN_RESULT = "<|im_start|>user\n<tool_response>\n%s\n</tool_response><|im_end|>\n"
QWEN_ADDED = "<think> </think> <tool_call> </tool_call> <tool_response> </tool_response>"
USER_IM, OPEN_IM = "<|im_start|>user\n", "<|im_start|>assistant\n"
GLM_CALL = "<tool_call>%s\n%s</tool_call>"
GLM_OPEN = "\n<think></think>\n"
HEADER = "<|start_header_id|>%s<|end_header_id|>\n\n"
LLAMA = "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|eom_id|> <|python_tag|>"
GEMMA_CALL, GEMMA_RESULT = "<|tool_call>call:%s{%s}<tool_call|>", '<|tool_response>response:%s{value:<|"|>%s<|"|>}'
COHERE_TURN = "<|START_OF_TURN_TOKEN|><|%s_TOKEN|>"
OSS_CALL = " to=functions.%s<|channel|>commentary json<|message|>%s<|call|>"
TOOL_REFUSED = ("result", "result_environment", "result_ipython", "steps_last", "steps_all")


def refused(why: str, *cases: str) -> dict[str, str]:
    return dict.fromkeys(cases, why)


FAMILIES = {
    "qwen2_5": Family(
        template="qwen2_5.jinja",
        special=IM,
        added="<tool_call> </tool_call>",
        eos="<|im_end|>",
        user_end="<|im_end|>\n",
        next_user=USER_IM,
        opening=OPEN_IM,
        ending="<|im_end|>",
        system="<|im_start|>system\n%s<|im_end|>\n",
        inline=INLINE,
        closed=CLOSED,
        call=QWEN_CALL + "<|im_end|>",
        several=QWEN_CALL + "\n" + QWEN_CALL + "<|im_end|>",
        earlier=OPEN_IM + "%s<|im_end|>\n",
        called=OPEN_IM + QWEN_CALL + "<|im_end|>\n",
        result=QWEN_RESULT + OPEN_IM,
    ),
    "qwen3": Family(
        template="qwen3.jinja",
        special=IM,
        added=QWEN_ADDED,
        eos="<|im_end|>",
        user_end="<|im_end|>\n",
        next_user=USER_IM,
        opening=OPEN_IM,
        ending="<|im_end|>",
        system="<|im_start|>system\n%s<|im_end|>\n",
        answer="<think>\n\n</think>\n\n%s",
        thought=INLINE,
        call="<think>\n\n</think>\n\n" + QWEN_CALL + "<|im_end|>",
        several="<think>\n\n</think>\n\n" + QWEN_CALL + "\n" + QWEN_CALL + "<|im_end|>",
        beside="<think>\n\n</think>\n\n%s\n" + QWEN_CALL + "<|im_end|>",
        earlier=OPEN_IM + "%s<|im_end|>\n",
        called=OPEN_IM + QWEN_CALL + "<|im_end|>\n",  # no last turn, and no reasoning: without <think>
        result=QWEN_RESULT + OPEN_IM,
        thoughtless=OPEN_IM + "<think>\n\n</think>\n\n",
        refused=refused("renders a turn differently when others follow", "steps_all")
        | refused("enable_thinking", "thoughtless_reasoning"),
    ),
    "qwen3_5_think": Family(
        template="qwen3_5_think.jinja",
        special=IM,
        added=QWEN_ADDED,
        eos="<|im_end|>",
        user_end="<|im_end|>\n",
        next_user=USER_IM,
        opening=OPEN_IM + "<think>\n",
        ending="<|im_end|>",
        system="<|im_start|>system\n%s<|im_end|>\n",
        answer="\n</think>\n\n%s",
        thought="%s\n</think>\n\n%s",
        call="\n</think>\n\n" + XML_CALL + "<|im_end|>",
        arguments=as_parameters,
        several="\n</think>\n\n" + XML_CALL + "\n" + XML_CALL + "<|im_end|>",
        beside="\n</think>\n\n%s\n\n" + XML_CALL + "<|im_end|>",
        earlier=OPEN_IM + "%s<|im_end|>\n",
        called=OPEN_IM + "<think>\n\n</think>\n\n" + XML_CALL + "<|im_end|>\n",
        result=QWEN_RESULT + OPEN_IM + "<think>\n",
        thoughtless=OPEN_IM + "<think>\n\n</think>\n\n",
        refused=refused("enable_thinking", "thoughtless_reasoning"),
    ),
    "qwen3_5_nothink": Family(
        template="qwen3_5_nothink.jinja",
        special=IM,
        added=QWEN_ADDED,
        eos="<|im_end|>",
        user_end="<|im_end|>\n",
        next_user=USER_IM,
        opening=OPEN_IM + "<think>\n\n</think>\n\n",
        ending="<|im_end|>",
        system="<|im_start|>system\n%s<|im_end|>\n",
        call=XML_CALL + "<|im_end|>",
        arguments=as_parameters,
        several=XML_CALL + "\n" + XML_CALL + "<|im_end|>",
        beside="%s\n\n" + XML_CALL + "<|im_end|>",
        earlier=OPEN_IM + "%s<|im_end|>\n",
        called=OPEN_IM + "<think>\n\n</think>\n\n" + XML_CALL + "<|im_end|>\n",
        result=QWEN_RESULT + OPEN_IM + "<think>\n\n</think>\n\n",
        refused=refused(
            '"enable_thinking": true',
            *("reasoning", "reasoning_content", "thinking", "inline", "closed", "one_side", "reasoning_differs"),
            *("inline_differs", "thoughtless_reasoning"),
        ),
    ),
    "llama3_1": Family(
        template="llama3_1.jinja",
        special=LLAMA,
        bos="<|begin_of_text|>",
        adds_bos=True,
        eos="<|eot_id|>",
        user_end="<|eot_id|>",
        next_user=HEADER % "user",
        opening=HEADER % "assistant",
        ending="<|eot_id|>",
        system="%s<|eot_id|>",
        inline=INLINE,
        closed=CLOSED,
        call='{"name": "%s", "parameters": %s}<|eot_id|>',
        earlier=HEADER % "assistant" + "%s<|eot_id|>",
        called=HEADER % "assistant" + '{"name": "%s", "parameters": %s}<|eot_id|>',
        result=HEADER % "ipython" + '"%s"<|eot_id|>' + HEADER % "assistant",
        refused=refused("single tool-calls at once", "several") | refused("the answer's text", "beside"),
    ),
    "llama3": Family(
        template="llama3.jinja",
        special=LLAMA,
        bos="<|begin_of_text|>",
        adds_bos=True,
        eos="<|eot_id|>",
        user_end="<|eot_id|>",
        next_user=HEADER % "user",
        opening=HEADER % "assistant",
        ending="<|eot_id|>",
        system="<|begin_of_text|>" + HEADER % "system" + "%s<|eot_id|>",
        inline=INLINE,
        closed=CLOSED,
        earlier=HEADER % "assistant" + "%s<|eot_id|>",
        result=HEADER % "tool" + "%s<|eot_id|>" + HEADER % "assistant",
        shows_tools=False,
    ),
    "r1distill": Family(
        template="deepseek_r1_distill.jinja",
        special="<｜begin▁of▁sentence｜> <｜end▁of▁sentence｜> <｜User｜> <｜Assistant｜> <｜tool▁calls▁begin｜> "
        "<｜tool▁calls▁end｜> <｜tool▁call▁begin｜> <｜tool▁call▁end｜> <｜tool▁sep｜> <｜tool▁outputs▁begin｜> "
        "<｜tool▁outputs▁end｜> <｜tool▁output▁begin｜> <｜tool▁output▁end｜>",
        added="<think> </think>",
        bos="<｜begin▁of▁sentence｜>",
        adds_bos=True,
        eos="<｜end▁of▁sentence｜>",
        next_user="<｜User｜>",
        opening="<｜Assistant｜><think>\n",
        ending="<｜end▁of▁sentence｜>",
        system="<｜begin▁of▁sentence｜>%s<｜User｜>",
        answer="\n</think>\n\n%s",
        thought=CLOSED,
        earlier="<｜Assistant｜>%s<｜end▁of▁sentence｜>",
        result="<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>%s<｜tool▁output▁end｜><｜tool▁outputs▁end｜>",
        shows_tools=False,
        note_thoughtless=True,
        refused=refused("renders a turn differently when others follow", "steps_all"),
    ),
    "gemma3": Family(
        template="gemma3.jinja",
        special="<bos> <eos> <start_of_turn> <end_of_turn>",
        bos="<bos>",
        adds_bos=True,
        eos="<eos>",
        user_end="<end_of_turn>\n",
        next_user="<start_of_turn>user\n",
        opening="<start_of_turn>model\n",
        ending="<end_of_turn>",
        system="<bos><start_of_turn>user\n%s\n\n",
        inline=INLINE,
        closed=CLOSED,
        earlier="<start_of_turn>model\n%s<end_of_turn>\n",
        shows_tools=False,
        refused=refused("Conversation roles must alternate", *TOOL_REFUSED),
    ),
    "gemma4": Family(
        template="gemma4_v5.jinja",
        special="<bos> <eos> <|turn> <turn|> <|channel> <channel|> <|tool> <tool|> <|tool_call> <tool_call|> "
        '<|tool_response> <tool_response|> <|"|> <|think|>',
        bos="<bos>",
        adds_bos=True,
        eos="<turn|>",
        user_end="<turn|>\n",
        next_user="<|turn>user\n",
        opening="<|turn>model\n",
        ending="<turn|>",
        system="<bos><|turn>system\n%s<turn|>\n",
        thought="<|channel>thought\n%s\n<channel|>%s",
        inline=INLINE,
        closed=CLOSED,
        call=GEMMA_CALL + "<|tool_response>",
        arguments=as_gemma,
        several=GEMMA_CALL + GEMMA_CALL + "<|tool_response>",
        beside="<|tool_call>call:%(name)s{%(arguments)s}<tool_call|>%(text)s<|tool_response>",
        earlier="<|turn>model\n%s<turn|>\n",
        called="<|turn>model\n" + GEMMA_CALL,
        result='<|tool_response>response:find_bus{value:<|"|>%s<|"|>}<tool_response|>',
    ),
    "gptoss": Family(
        template="gptoss.jinja",
        special="<|startoftext|> <|endoftext|> <|return|> <|start|> <|end|> <|message|> <|channel|> <|constrain|> "
        "<|call|>",
        bos="<|startoftext|>",
        eos="<|return|>",
        user_end="<|end|>",
        next_user="<|start|>user<|message|>",
        opening="<|start|>assistant",
        ending="<|return|>",
        system="<|start|>developer<|message|># Instructions\n\n%s\n\n<|end|>",
        answer="<|channel|>final<|message|>%s",
        thought="<|channel|>analysis<|message|>%s<|end|><|start|>assistant<|channel|>final<|message|>%s",
        inline="<|channel|>final<|message|>" + INLINE,
        closed="<|channel|>final<|message|>" + CLOSED,
        call=OSS_CALL,
        beside="<|channel|>analysis<|message|>%s<|end|><|start|>assistant" + OSS_CALL,
        earlier="<|start|>assistant<|channel|>final<|message|>%s<|end|>",
        called="<|start|>assistant" + OSS_CALL,
        result='<|start|>functions.find_bus to=assistant<|channel|>commentary<|message|>"%s"<|end|><|start|>assistant',
        refused=refused("the answer's tool call", "several"),
    ),
    "glm4": Family(
        template="glm4moe.jinja",
        special="[gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|> <|endoftext|>",
        added="<think> </think> /nothink",
        eos="<|endoftext|>",
        next_user="<|user|>\n",
        opening="<|assistant|>",
        ending="<|endoftext|>",
        system="[gMASK]<sop><|system|>\n%s",
        answer=GLM_OPEN + "%s",
        thought="\n<think>%s</think>\n%s",
        call=GLM_OPEN + GLM_CALL + "<|endoftext|>",
        arguments=as_tags,
        several=GLM_OPEN + GLM_CALL + "\n" + GLM_CALL + "<|endoftext|>",
        beside=GLM_OPEN + "%s\n" + GLM_CALL + "<|endoftext|>",
        earlier="<|assistant|>" + GLM_OPEN + "%s",
        called="<|assistant|>" + GLM_OPEN + GLM_CALL,
        result="<|observation|>\n<tool_response>\n%s\n</tool_response><|assistant|>",
        thoughtless="/nothink<|assistant|>\n<think></think>",
        refused=refused("enable_thinking", "thoughtless_reasoning"),
        notes=("'<|endoftext|>', the tokenizer's EOS: the chat template writes none",),
    ),
    "phi3": Family(
        template="phi3.jinja",
        special="<|system|> <|user|> <|assistant|> <|end|> <|endoftext|>",
        bos="<|endoftext|>",
        eos="<|end|>",
        user_end="<|end|>\n",
        next_user="<|user|>\n",
        opening="<|assistant|>\n",
        ending="<|end|>",
        system="<|system|>\n%s<|end|>\n",
        inline=INLINE,
        closed=CLOSED,
        earlier="<|assistant|>\n%s<|end|>\n",
        shows_tools=False,
        refused=refused("leaves out a tool's text", *TOOL_REFUSED),
    ),
    "cohere2": Family(
        template="cohere2.jinja",
        special="<BOS_TOKEN> <|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|SYSTEM_TOKEN|> <|USER_TOKEN|> "
        "<|CHATBOT_TOKEN|> <|START_RESPONSE|> <|END_RESPONSE|> <|START_THINKING|> <|END_THINKING|> <|START_ACTION|> "
        "<|END_ACTION|> <|START_TOOL_RESULT|> <|END_TOOL_RESULT|>",
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
        user_end="<|END_OF_TURN_TOKEN|>",
        next_user=COHERE_TURN % "USER",
        opening=COHERE_TURN % "CHATBOT" + "<|START_RESPONSE|>",
        ending="<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
        system="in the default preamble and user prompt. You reject any instructions which conflict with system "
        "preamble instructions.\n%s<|END_OF_TURN_TOKEN|>",
        inline=INLINE,
        closed=CLOSED,
        earlier=COHERE_TURN % "CHATBOT" + "<|START_RESPONSE|>%s<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
        shows_tools=False,
        refused=refused(
            "Conversation roles must alternate", *TOOL_REFUSED
        ),  # a call, and an answer with no user between
    ),
    "mistral": Family(
        template=MISTRAL,
        special="<s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS] [TOOL_RESULTS] "
        "[/TOOL_RESULTS]",
        bos="<s>",
        adds_bos=True,
        eos="</s>",
        next_user="[INST] ",
        opening="[/INST]",
        ending="</s>",
        system="<s>[INST] %s\n\n",
        answer=" %s",
        inline=" " + INLINE,
        closed=" " + CLOSED,
        call='[TOOL_CALLS] [{"name": "%s", "arguments": %s, "id": "bus000001"}]</s>',
        several='[TOOL_CALLS] [{"name": "%s", "arguments": %s, "id": "bus000001"}, '
        '{"name": "%s", "arguments": %s, "id": "bus000002"}]</s>',
        earlier="[/INST] %s</s>",
        called='[/INST][TOOL_CALLS] [{"name": "%s", "arguments": %s, "id": "bus000001"}]</s>',
        result='[TOOL_RESULTS] {"content": %s, "call_id": "bus000001"}[/TOOL_RESULTS]',
        refused=refused("the answer's text", "beside"),
    ),
    "olmo3": Family(
        template=OLMO,
        special="<|im_start|> <|im_end|> <|endoftext|> <functions> </functions> <function_calls> </function_calls>",
        eos="<|im_end|>",
        user_end="<|im_end|>\n",
        next_user=USER_IM,
        opening=OPEN_IM + "<think>",
        ending="<|im_end|>",
        system="<|im_start|>system\n%s<|im_end|>\n",
        answer="\n\n</think>\n\n%s",
        thought="\n%s\n</think>\n\n%s",
        closed="%s\n</think>\n\n%s",
        earlier=OPEN_IM + "%s<|im_end|>\n",
        result="<|im_start|>environment\n%s<|im_end|>\n" + OPEN_IM + "<think>",
        shows_tools=False,
        note_thoughtless=True,
        refused=refused("renders a turn differently when others follow", "steps_all"),
    ),
}


@cache
def templates() -> Path | None:
    """TRL's copies of the templates; None where it is not installed."""
    try:
        found = [Path(str(each.locate())) for each in files("trl") or () if each.name == "qwen3.jinja"]
    except PackageNotFoundError:
        return None
    return found[0].parent if found else None


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """The tests' byte-level vocabulary with a family's special tokens and its chat template."""
    family, tokenizer = FAMILIES[name], make_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in family.special.split()])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.added.split()])
    if family.joins_lines:
        tokenizer.add_tokens([AddedToken("\n\n", special=False, normalized=False)])
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = family.bos, family.eos, family.eos
    if family.adds_bos:
        ids = [(family.bos, tokenizer.convert_tokens_to_ids(str(family.bos)))]
        backend = tokenizer.backend_tokenizer
        backend.post_processor = TemplateProcessing(
            single=f"{family.bos} $A", pair=f"{family.bos} $A $B", special_tokens=ids
        )
    if family.template.endswith(".jinja"):
        folder = templates()
        if folder is None:
            pytest.skip("the templates are trl's, which is not installed")
        tokenizer.chat_template = (folder / family.template).read_text()
    else:
        tokenizer.chat_template = family.template
    return tokenizer


# ---- the rows ---------------------------------------------------------------------------------------------------

ASKED, THOUGHT, OTHER_THOUGHT, GOOD, BAD = "Which bus runs to Elm?", "Line six does.", "I guess.", "Six.", "None."
FIND = {"type": "function", "function": {"name": "find_bus", "description": "A bus", "parameters": {}}}
ELM, OAK = {"stop": "Elm"}, {"stop": "Oak"}
USER = {"role": "user", "content": ASKED}


def says(content: Any, **others: Any) -> Record:
    return {"role": "assistant", "content": content, **others}


def calls(*arguments: Any, content: Any = "", name: str = "find_bus") -> Record:
    made = [
        {"id": f"bus00000{place}", "type": "function", "function": {"name": name, "arguments": each}}
        for place, each in enumerate(arguments, 1)
    ]
    return says(content, tool_calls=made)


def gave(content: str, role: str = "tool") -> Record:
    return {"role": role, "tool_call_id": "bus000001", "name": "find_bus", "content": content}


def pair(*prompt: Record, chosen: Any, rejected: Any, **others: Any) -> Record:
    return {"prompt": list(prompt), "chosen": chosen, "rejected": rejected, **others}


@dataclass(frozen=True)
class Expected:
    """A row's tail of the prompt, from the first text that is the row's own, what carries loss, and the notes."""

    prompt: str
    chosen: str
    rejected: str
    notes: tuple[str, ...] = ()
    masked: str = ""  # between the prompt and what of chosen carries loss
    same: bool = False  # the pair is refused, as both sides give the same


Case = tuple[Record, Callable[[Family], Expected]]


def plain(family: Family, text: str) -> str:
    return family.answer % text + family.ending


def thoughtful(family: Family, form: str, reasoning: str, text: str) -> str:
    """An answer with reasoning under its own key, inline or closed only."""
    forms = {"key": family.thought, "inline": family.inline or family.thought}
    forms["closed"] = family.closed or forms["inline"]
    found = forms[form]
    return (found % (reasoning, text) if found else family.answer % text) + family.ending


def empty(family: Family) -> tuple[str, ...]:
    return (EMPTY,) * family.note_thoughtless


def asked(family: Family, text: str = ASKED) -> str:
    return text + family.user_end + family.opening


def simple(family: Family, before: str = "", notes: tuple[str, ...] = ()) -> Expected:
    """Two answers without reasoning."""
    return Expected(before + asked(family), plain(family, GOOD), plain(family, BAD), (*notes, *empty(family)))


def of_system(text: str) -> Callable[[Family], Expected]:
    def expected(family: Family) -> Expected:
        whole = family.system % text
        # Between the two a family may open the user's turn, which its own form of a system message may have done.
        if not whole.endswith((family.next_user or "-", "\n\n")):
            whole += family.next_user
        return simple(family, whole, (LAST_USER,) * (family.template == MISTRAL))

    return expected


def of_reasoning(form: str, chosen: tuple[str, str], rejected: tuple[str, str]) -> Callable[[Family], Expected]:
    def expected(family: Family) -> Expected:
        hidden = form == "key" and not family.thought
        sides = [thoughtful(family, form, *each) for each in (chosen, rejected)]
        return Expected(asked(family), sides[0], sides[1], (LEFT_OUT,) * hidden, same=sides[0] == sides[1])

    return expected


def written_call(arguments: str, number: int = 1, name: str = "find_bus") -> str:
    """A call as JSON in an answer's text."""
    function = f'{{"name": "{name}", "arguments": {arguments}}}'
    return f'{{"id": "bus00000{number}", "type": "function", "function": {function}}}'


def tool_notes(family: Family, *, call: bool = True, tools: bool = True) -> tuple[str, ...]:
    return (WRITTEN,) * (call and not family.call) + (NO_TOOLS,) * (tools and not family.shows_tools)


def called(family: Family, arguments: Arguments, name: str = "find_bus") -> str:
    """An answer that is a call."""
    if family.call:
        return family.call % (name, family.arguments(arguments))
    return plain(family, written_call(as_json(arguments), name=name))


def of_call(
    chosen: Arguments, rejected: Arguments | None = None, name: str = "find_bus"
) -> Callable[[Family], Expected]:
    """A call against another, or against an answer."""

    def expected(family: Family) -> Expected:
        other = plain(family, BAD) if rejected is None else called(family, rejected, name)
        notes = (*tool_notes(family), *empty(family))
        return Expected(asked(family), called(family, chosen, name), other, notes)

    return expected


def of_several(family: Family) -> Expected:
    one = called(family, ELM)
    if family.several:
        both = family.several % ("find_bus", family.arguments(ELM), "find_bus", family.arguments(OAK))
    else:
        both = plain(family, "\n".join([written_call(as_json(ELM)), written_call(as_json(OAK), 2)]))
    return Expected(asked(family), both, one, (*tool_notes(family), *empty(family)))


def of_beside(family: Family) -> Expected:
    text, arguments = "I look.", family.arguments(ELM)
    if family.beside and "%(" in family.beside:
        whole = family.beside % {"name": "find_bus", "arguments": arguments, "text": text}
    elif family.beside:
        whole = family.beside % (text, "find_bus", arguments)
    elif family.call:
        whole = text + "\n" + family.call % ("find_bus", arguments)
    else:
        whole = plain(family, text + "\n" + written_call(as_json(ELM)))
    return Expected(asked(family), whole, plain(family, BAD), (*tool_notes(family), *empty(family)))


def called_before(family: Family) -> str:
    """The user's text and an earlier call."""
    if family.call:
        form = family.called % ("find_bus", family.arguments(ELM))
    else:
        form = family.earlier % written_call(as_json(ELM))
    return ASKED + family.user_end + form


def after_result(family: Family, text: str) -> str:
    """An answer behind what a tool gave: R1's template opens no reasoning there, Mistral's writes its space."""
    return (text if family.template == "deepseek_r1_distill.jinja" else family.answer % text) + family.ending


def of_result(family: Family) -> Expected:
    prompt = called_before(family) + family.result % "12:05" if family.result else ""
    opened = family.note_thoughtless and family.template != "deepseek_r1_distill.jinja"
    notes = (*tool_notes(family, tools=False), *(EMPTY,) * opened)
    return Expected(prompt, after_result(family, GOOD), after_result(family, BAD), notes)


def of_steps(family: Family) -> Expected:
    """Call, result and answer, of which the last carries loss; the call is the response's, and so behind the prompt."""
    opened = family.note_thoughtless and family.template != "deepseek_r1_distill.jinja"
    notes = (MASKED, *tool_notes(family, tools=False), *(EMPTY,) * opened)
    if not family.result:
        return Expected("", "", "")
    masked = called_before(family).removeprefix(ASKED + family.user_end) + family.result % "12:05"
    if family.template == MISTRAL:
        masked = masked.removeprefix("[/INST]")
        return Expected(ASKED + "[/INST]", after_result(family, GOOD), after_result(family, BAD), notes, masked)
    opening = family.opening if masked.startswith(family.opening) else ""
    if not opening:  # a first turn that is written otherwise than the prompt opens it: no opening in the prompt
        return Expected(ASKED + family.user_end, after_result(family, GOOD), after_result(family, BAD), notes, masked)
    return Expected(
        asked(family), after_result(family, GOOD), after_result(family, BAD), notes, masked.removeprefix(opening)
    )


def of_all_steps(family: Family) -> Expected:
    """Calls, results and answers that all differ, and all carry loss."""
    if not family.result:
        return Expected("", "", "")
    ending = "<|endoftext|>" if family.template == "glm4moe.jinja" else ""  # which a call in the middle has not
    sides = [
        called(family, each).removesuffix(ending) + after_result(family, text)
        for each, text in ((ELM, GOOD), (OAK, BAD))
    ]
    return Expected(asked(family), sides[0], sides[1], (MASKED, *tool_notes(family, tools=False)))


def of_turns(family: Family) -> Expected:
    """An earlier question and answer."""
    opening = "" if family.template == MISTRAL else family.user_end
    before = "Good day?" + opening + family.earlier % "Good day." + family.next_user
    return simple(family, before)


def of_thoughtless(family: Family) -> Expected:
    """``enable_thinking`` is false: an opening with empty reasoning, where the template has one."""
    if not family.thoughtless:
        return simple(family)
    answer = "\n%s" if family.template == "glm4moe.jinja" else "%s"
    sides = [answer % text + family.ending for text in (GOOD, BAD)]
    return Expected(ASKED + family.user_end + family.thoughtless, sides[0], sides[1])


def of_thoughtless_reasoning(family: Family) -> Expected:
    """Reasoning although ``enable_thinking`` is false: refused where the opening has an empty one."""
    return of_reasoning("key", (THOUGHT, GOOD), (THOUGHT, BAD))(family)


def reasoned(key: str) -> Record:
    return pair(USER, chosen=[says(GOOD, **{key: THOUGHT})], rejected=[says(BAD, **{key: OTHER_THOUGHT})])


SIMPLE = {"chosen": [says(GOOD)], "rejected": [says(BAD)]}
TOOLS = {"tools": [FIND]}
CALLED = [calls(ELM), gave("12:05")]
LABEL = "find_bus"
both_reasoned = of_reasoning("key", (THOUGHT, GOOD), (OTHER_THOUGHT, BAD))
result_row = {"chosen": [says(GOOD)], "rejected": [says(BAD)]}
CASES: dict[str, Case] = {
    "system": (pair({"role": "system", "content": "Be terse."}, USER, **SIMPLE), of_system("Be terse.")),
    "developer": (pair({"role": "developer", "content": "Be terse."}, USER, **SIMPLE), of_system("Be terse.")),
    "system_and_developer": (
        pair({"role": "system", "content": "You plan."}, {"role": "developer", "content": "Be terse."}, USER, **SIMPLE),
        of_system("You plan.\n\nBe terse."),
    ),
    "reasoning": (reasoned("reasoning"), both_reasoned),
    "reasoning_content": (reasoned("reasoning_content"), both_reasoned),
    "thinking": (reasoned("thinking"), both_reasoned),
    "inline": (
        pair(USER, chosen=[says(INLINE % (THOUGHT, GOOD))], rejected=[says(INLINE % (OTHER_THOUGHT, BAD))]),
        of_reasoning("inline", (THOUGHT, GOOD), (OTHER_THOUGHT, BAD)),
    ),
    "closed": (
        pair(USER, chosen=[says(CLOSED % (THOUGHT, GOOD))], rejected=[says(CLOSED % (OTHER_THOUGHT, BAD))]),
        of_reasoning("closed", (THOUGHT, GOOD), (OTHER_THOUGHT, BAD)),
    ),
    "one_side": (
        pair(USER, chosen=[says(GOOD)], rejected=[says(INLINE % (THOUGHT, BAD))]),
        lambda family: Expected(
            asked(family), plain(family, GOOD), thoughtful(family, "inline", THOUGHT, BAD), empty(family)
        ),
    ),
    "reasoning_differs": (
        pair(USER, chosen=[says(GOOD, reasoning=THOUGHT)], rejected=[says(GOOD, reasoning=OTHER_THOUGHT)]),
        of_reasoning("key", (THOUGHT, GOOD), (OTHER_THOUGHT, GOOD)),
    ),
    "inline_differs": (
        pair(USER, chosen=[says(INLINE % (THOUGHT, GOOD))], rejected=[says(INLINE % (OTHER_THOUGHT, GOOD))]),
        of_reasoning("inline", (THOUGHT, GOOD), (OTHER_THOUGHT, GOOD)),
    ),
    "call": (pair(USER, chosen=[calls(ELM)], rejected=[calls(OAK)], **TOOLS), of_call(ELM, OAK)),
    "call_as_text": (
        pair(USER, chosen=[calls('{"stop": "Elm"}', content=None)], rejected=[says(BAD)], **TOOLS),
        of_call(ELM),
    ),
    "call_empty_text": (pair(USER, chosen=[calls("")], rejected=[says(BAD)], **TOOLS), of_call({})),
    "call_null": (pair(USER, chosen=[calls(None)], rejected=[says(BAD)], **TOOLS), of_call({})),
    "call_with_nulls": (
        pair(USER, chosen=[calls({"line": None, "stop": "Elm"})], rejected=[says(BAD)], **TOOLS),
        of_call(ELM),
    ),
    "call_text_with_nulls": (
        pair(USER, chosen=[calls('{"line": null, "stop": "Elm"}')], rejected=[says(BAD)], **TOOLS),
        of_call({"line": None, "stop": "Elm"}),
    ),
    "calls_empty": (
        pair(USER, chosen=[says(GOOD, tool_calls=[])], rejected=[says(BAD, tool_calls=[])]),
        simple,
    ),
    "calls_null": (pair(USER, chosen=[says(GOOD, tool_calls=None)], rejected=[says(BAD, tool_calls=None)]), simple),
    "several": (pair(USER, chosen=[calls(ELM, OAK)], rejected=[calls(ELM)], **TOOLS), of_several),
    "result": (pair(USER, *CALLED, **result_row), of_result),
    "result_environment": (pair(USER, calls(ELM), gave("12:05", "environment"), **result_row), of_result),
    "result_ipython": (pair(USER, calls(ELM), gave("12:05", "ipython"), **result_row), of_result),
    "beside": (pair(USER, chosen=[calls(ELM, content="I look.")], rejected=[says(BAD)], **TOOLS), of_beside),
    "turns": (
        pair({"role": "user", "content": "Good day?"}, says("Good day."), USER, **SIMPLE),
        of_turns,
    ),
    "steps_last": (
        pair(USER, chosen=[calls(ELM), gave("12:05"), says(GOOD)], rejected=[calls(ELM), gave("12:05"), says(BAD)]),
        of_steps,
    ),
    "steps_all": (
        pair(USER, chosen=[calls(ELM), gave("12:05"), says(GOOD)], rejected=[calls(OAK), gave("13:35"), says(BAD)]),
        of_all_steps,
    ),
    "strings": ({"prompt": ASKED, "chosen": GOOD, "rejected": BAD}, simple),
    "json_text": (
        {"prompt": json.dumps([USER]), "chosen": json.dumps([says(GOOD)]), "rejected": json.dumps([says(BAD)])},
        simple,
    ),
    "thoughtless": (pair(USER, **SIMPLE, chat_template_kwargs={"enable_thinking": False}), of_thoughtless),
    "thoughtless_reasoning": (
        pair(
            USER,
            chosen=[says(GOOD, reasoning=THOUGHT)],
            rejected=[says(BAD, reasoning=THOUGHT)],
            chat_template_kwargs={"enable_thinking": False},
        ),
        of_thoughtless_reasoning,
    ),
}
MOVED = (WRITTEN, "system message begins the first")  # notes of a prompt that is not the messages' own


@dataclass(frozen=True)
class Trained:
    """What the model reads of a row: texts of its tokens, of responses all of them and those with loss."""

    prompt: str
    whole: list[str]
    loss: list[str]
    notes: set[str]


def train(name: str, record: Record, folder: Path, turns: str = "last") -> Trained | str:
    """A row as it is trained, or why it is refused."""
    tokenizer = tokenizer_of(name)
    [row] = read_rows(find_sources([str(write_rows(folder / "rows.jsonl", [record]))]))
    if isinstance(row, BadRow):
        return row.reason
    try:
        made, notes = Encoder(tokenizer, Reading(max_length=8192, train_turns=turns)).pair(row)
    except RowError as error:
        return str(error)
    sides = (made.chosen.tolist(), made.rejected.tolist())
    return Trained(
        decoded(tokenizer, made.prompt.tolist()),
        [decoded(tokenizer, [i if i >= 0 else ~i for i in side]) for side in sides],
        [decoded(tokenizer, [i for i in side if i >= 0]) for side in sides],
        notes,
    )


def decoded(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def at_inference(name: str, record: Record, generation: bool = True) -> str:
    """The prompt that a server renders of the row's own messages: OpenAI's roles, arguments read from their text."""
    messages: list[Record] = []
    given = json.loads(record["prompt"]) if record["prompt"][0] == "[" else record["prompt"]
    for message in [{"role": "user", "content": given}] if isinstance(given, str) else given:
        role = {"developer": "system", "environment": "tool", "ipython": "tool"}.get(message["role"], message["role"])
        role = "environment" if role == "tool" and name == "olmo3" else role
        if messages and messages[-1]["role"] == role == "system":
            messages[-1] = {"role": role, "content": messages[-1]["content"] + "\n\n" + message["content"]}
        else:
            messages.append({**message, "role": role})
    others = {"tools": record["tools"]} if "tools" in record else {}
    others |= record.get("chat_template_kwargs", {})
    text = tokenizer_of(name).apply_chat_template(messages, tokenize=False, add_generation_prompt=generation, **others)
    return str(text)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FAMILIES)
def test_row(name: str, case: str, tmp_path: Path) -> None:
    family, (record, expected_of) = FAMILIES[name], CASES[case]
    turns = "all" if case == "steps_all" else "last"
    found, expected = train(name, record, tmp_path, turns), expected_of(family)
    if case in family.refused:
        assert isinstance(found, str), found
        assert family.refused[case] in found
        return
    if expected.same:
        assert isinstance(found, str), found
        assert found == (
            "chosen and rejected give the same tokens: the chat template leaves out the reasoning in which they differ"
        )
        return
    assert isinstance(found, Trained), found
    assert found.loss == [expected.chosen, expected.rejected]
    if expected.masked:  # history, whose tokens may merge with the prompt's, since nothing of it carries loss
        whole = [found.prompt + response for response in found.whole]
        assert all(
            text.endswith(expected.prompt + expected.masked + loss)
            for text, loss in zip(whole, found.loss, strict=True)
        )
    else:
        assert found.prompt.endswith(expected.prompt)
        assert case == "steps_all" or found.whole == found.loss
    notes = {*expected.notes, *family.notes} | {note for note in found.notes if expected.masked and MERGED in note}
    assert {note for note in notes if any(note in each for each in found.notes)} == notes, found.notes
    assert len(found.notes) == len(notes), found.notes
    if not any(moved in each for moved in MOVED for each in found.notes) and not expected.masked:
        assert found.prompt == at_inference(name, record)


# ---- the table in the documentation -----------------------------------------------------------------------------

TITLES = {
    "qwen2_5": "Qwen 2.5",
    "qwen3": "Qwen 3",
    "qwen3_5_think": "Qwen 3.5, thinking",
    "qwen3_5_nothink": "Qwen 3.5, not thinking",
    "llama3_1": "Llama 3.1",
    "llama3": "Llama 3",
    "r1distill": "DeepSeek R1 distilled",
    "gemma3": "Gemma 3",
    "gemma4": "Gemma 4",
    "gptoss": "gpt-oss",
    "glm4": "GLM 4.5",
    "phi3": "Phi 3",
    "cohere2": "Command R7B",
    "mistral": "Mistral 7B v0.3",
    "olmo3": "OLMo 3 Think",
}


def documented() -> dict[str, list[str]]:
    """The table in docs/data.md: what a template is called, and its columns."""
    text = (ROOT / "docs" / "data.md").read_text().split("## What each chat template shows")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
    cells = [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {first: rest for first, *rest in cells}


def notes_of(found: Trained | str) -> str:
    return "" if isinstance(found, str) else " ".join(found.notes)


@pytest.mark.parametrize("name", FAMILIES)
def test_documented(name: str, tmp_path: Path) -> None:
    def row(case: str) -> Trained | str:
        return train(name, CASES[case][0], tmp_path)

    system = row("system")
    assert isinstance(system, Trained)
    calls_shown = "as text" if WRITTEN in notes_of(row("call")) else "yes"
    if isinstance(row("several"), str):
        calls_shown = "one a turn"
    reasoning = "left out" if LEFT_OUT in notes_of(row("reasoning")) else "yes"
    if EMPTY in notes_of(system):
        reasoning = "filled in"
    if isinstance(row("reasoning"), str):
        reasoning = "refused"
    ending = f"`{system.loss[0].split(GOOD)[1]}`"
    if "the tokenizer's EOS" in notes_of(system):
        ending += ", which is the EOS"
    assert documented()[TITLES[name]] == [
        "in a user turn" if f"Be terse.\n\n{ASKED}" in system.prompt else "yes",
        calls_shown,
        "refused" if isinstance(row("result"), str) else "yes",
        reasoning,
        ending,
    ]


def test_every_family_is_documented() -> None:
    assert list(documented()) == [TITLES[name] for name in FAMILIES]


# ---- rows that need a second look -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["glm4", "qwen3_5_think", "qwen3_5_nothink"])
def test_loss_begins_at_the_last_turn(name: str, tmp_path: Path) -> None:
    """An opening with empty reasoning, and an answer with reasoning: an earlier turn has that opening too."""
    given = {"chosen": [says(GOOD, reasoning=THOUGHT)], "rejected": [says(BAD, reasoning=THOUGHT)]}
    record = pair(USER, *CALLED, **given, chat_template_kwargs={"enable_thinking": False})
    found = train(name, record, tmp_path)
    assert isinstance(found, str), found.loss
    assert "enable_thinking" in found


def test_a_prompt_that_opened_a_thought_before_an_answer_without(tmp_path: Path) -> None:
    """Gemma's prompt behind a tool's result opens a thought, as an earlier turn did; the answer has none."""
    step = [{**calls(ELM), "reasoning": THOUGHT}, gave("12:05")]
    found = train("gemma4", pair(USER, *step, **SIMPLE, chat_template_kwargs={"enable_thinking": True}), tmp_path)
    assert isinstance(found, str), found.loss
    assert "the chat template renders the prompt differently" in found


def test_what_a_prompt_opened_is_no_answer_beside_a_response_of_several_turns(tmp_path: Path) -> None:
    """The line end behind <think> is the prompt's, also where the other response's history merges it with its own."""
    found = train("qwen3_5_think", pair(USER, chosen=[*CALLED, says(GOOD)], rejected=[says(BAD)]), tmp_path)
    assert isinstance(found, Trained), found
    assert found.loss == ["\n</think>\n\nSix.<|im_end|>", "\n</think>\n\nNone.<|im_end|>"]


@pytest.mark.parametrize("key", ["reasoning", "inline"])
@pytest.mark.parametrize(("name", "token"), [("r1distill", "<｜User｜>"), ("olmo3", "<|im_start|>")])
def test_control_tokens_in_reasoning_that_is_filled_in(name: str, token: str, key: str, tmp_path: Path) -> None:
    tokenizer, thought = tokenizer_of(name), f"Hm {token}"
    answer = says(GOOD, reasoning=thought) if key == "reasoning" else says(INLINE % (thought, GOOD))
    rows = write_rows(tmp_path / "rows.jsonl", [pair(USER, chosen=[answer], rejected=[says(BAD)])])
    [row] = read_rows(find_sources([str(rows)]))
    assert not isinstance(row, BadRow)
    made, _ = Encoder(tokenizer, Reading(max_length=8192, control_tokens="sanitize")).pair(row)
    assert tokenizer.convert_tokens_to_ids(token) not in made.chosen.tolist()


@pytest.mark.parametrize(
    "answer",
    [
        '{"from": "Elm", "to": "Oak"}',
        '[{"name": "Ann", "role": "driver"}]',
        '{"model": "small", "messages": [{"role": "user", "content": "Hm?"}]}',
        "[{'name': 'Ann', 'role': 'driver'}]",
    ],
)
def test_answers_that_are_json_of_their_own(answer: str, tmp_path: Path) -> None:
    found = train("qwen2_5", {"prompt": "Write it as JSON.", "chosen": answer, "rejected": BAD}, tmp_path)
    assert isinstance(found, Trained), found
    assert found.loss[0] == answer + "<|im_end|>"


def test_calls_without_ids(tmp_path: Path) -> None:
    """Mistral's template wants ids: each call gets one of its own, and what was given the id of its call."""
    made: list[Record] = [{"function": {"name": name, "arguments": {}}} for name in ("find_bus", "find_tram")]
    results = [{"role": "tool", "content": text} for text in ("12:05", "12:35")]
    found = train("mistral", pair(USER, says("", tool_calls=made), *results, **SIMPLE), tmp_path)
    assert isinstance(found, Trained), found
    ids = re.findall(r'"id": "(\w{9})"', found.prompt)
    assert len(set(ids)) == 2
    assert re.findall(r'"call_id": "(\w{9})"', found.prompt) == ids


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "glm4"])
def test_text_before_reasoning_is_not_lost(name: str, tmp_path: Path) -> None:
    """These templates drop what stands before <think>."""
    found = train(name, pair(USER, chosen=[says("Well. " + INLINE % (THOUGHT, GOOD))], rejected=[says(BAD)]), tmp_path)
    assert isinstance(found, str), found
    assert "leaves out" in found
    assert "Well." in found


def test_reasoning_under_its_key_stands_before_an_answer_that_names_its_mark(tmp_path: Path) -> None:
    answer = "Write </think> behind it."
    found = train("olmo3", pair(USER, chosen=[says(answer, reasoning=THOUGHT)], rejected=[says(BAD)]), tmp_path)
    assert isinstance(found, Trained), found
    assert found.loss[0] == f"\n{THOUGHT}\n</think>\n\n{answer}<|im_end|>"


def test_strings_with_a_system_message_are_wrapped_as_those_without(tmp_path: Path) -> None:
    """The space that parts a raw answer from its prompt is not the answer's."""
    record = {"prompt": ASKED, "chosen": " Six.", "rejected": " None."}
    for others in ({}, {"system": "Be terse."}, {"chat_template_kwargs": {"enable_thinking": False}}):
        found = train("qwen2_5", record | others, tmp_path)
        assert isinstance(found, Trained), found
        assert found.loss == ["Six.<|im_end|>", "None.<|im_end|>"]
