"""Tokenizers with the chat templates of many families."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AddedToken, PreTrainedTokenizerFast

from tests.helpers import make_tokenizer

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


FIND = {"type": "function", "function": {"name": "find_bus", "description": "A bus", "parameters": {}}}


def plain(family: Family, text: str) -> str:
    return family.answer % text + family.ending


def written_call(arguments: str, number: int = 1, name: str = "find_bus") -> str:
    """A call as JSON in an answer's text."""
    function = f'{{"name": "{name}", "arguments": {arguments}}}'
    return f'{{"id": "bus00000{number}", "type": "function", "function": {function}}}'


def called(family: Family, arguments: Arguments, name: str = "find_bus") -> str:
    """An answer that is a call."""
    if family.call:
        return family.call % (name, family.arguments(arguments))
    return plain(family, written_call(as_json(arguments), name=name))


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
