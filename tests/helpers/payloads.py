"""Sixty texts that would run, load or change something if a page took them for more than text; a report of them."""

from __future__ import annotations

import dataclasses
from typing import Any

from dpo_cli.evaluation.evaluator import Evaluation
from dpo_cli.reporting.html import ReportInput
from tests.helpers.synthetic import make_evaluation, make_pair, make_token

RUN = "window.canary=1"  # what each tries to run
PAYLOADS = (
    f"<script>{RUN}</script>",
    f"<ScRiPt>{RUN}</sCrIpT>",
    f"<script\n>{RUN}</script\n>",
    f"<script/x>{RUN}</script>",
    f"<scr<script>ipt>{RUN}</scr</script>ipt>",
    f"<<script>{RUN}//<</script>",
    "<script src=https://example.org/a.js></script>",
    "<script src=//example.org/a.js></script>",
    "<script type=module src='data:text/javascript,window.canary=1'></script>",
    f"</title><script>{RUN}</script>",
    f"</style><script>{RUN}</script>",
    f"</textarea></noscript></template><script>{RUN}</script>",
    f"</span></p></div></details></section></main></body></html><script>{RUN}</script>",
    f"--><script>{RUN}</script><!--",
    f"]]><script>{RUN}</script><![CDATA[",
    f"<!--[if gte IE 4]><script>{RUN}</script><![endif]-->",
    f"<img src=x onerror={RUN}>",
    f"<img src=x onerror='{RUN}'",
    f'"><img src=x onerror="{RUN}">',
    f"'><img src=x onerror='{RUN}'>",
    "<img src=https://example.org/pixel.png>",
    '<img srcset="https://example.org/a 1x">',
    f"<image/src=x onerror={RUN}>",
    f"<svg onload={RUN}>",
    f"<svg><script>{RUN}</script></svg>",
    f"<svg><animate onbegin={RUN} attributeName=x dur=1s>",
    f"<svg><a xlink:href='javascript:{RUN}'><text y=20>x</text></a></svg>",
    "<svg><use href='data:image/svg+xml,<svg id=x/>#x'/></svg>",
    f"<math><mtext></p><img src=x onerror={RUN}></mtext></math>",
    f"<body onload={RUN}>",
    f"<iframe srcdoc='<script>parent.{RUN}</script>'></iframe>",
    f"<iframe src=javascript:{RUN}></iframe>",
    "<object data=https://example.org/a.swf></object>",
    "<embed src=https://example.org/a.swf>",
    f"<video><source onerror={RUN}></video>",
    f"<audio src=x onerror={RUN}>",
    f"<input autofocus onfocus={RUN}>",
    f"<details open ontoggle={RUN}>",
    f"<marquee onstart={RUN}>",
    f"<a href=javascript:{RUN}>x</a>",
    f"<a href='java\tscript:{RUN}'>x</a>",
    f"javascript:{RUN}",
    f"data:text/html,<script>{RUN}</script>",
    f"<form action=javascript:{RUN}><button>x</button></form>",
    "<base href=https://example.org/>",
    "<meta http-equiv=refresh content='0;url=https://example.org/'>",
    "<meta http-equiv=Content-Security-Policy content='script-src *'>",
    "<link rel=stylesheet href=https://example.org/a.css>",
    "<style>@import 'https://example.org/a.css';</style>",
    "<style>body{background:url(https://example.org/a)}</style>",
    "};*{background:url(https://example.org/a)}",
    '" style="position:fixed;inset:0;background:red',
    f'" onmouseover="{RUN}" x="',
    f"' onmouseover='{RUN}' x='",
    f"x` onmouseover=`{RUN}` x=`",
    "{{7*7}}{% include '/etc/passwd' %}{# x #}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}${7*7}<%= 7*7 %>",
    f"&lt;script&gt;{RUN}&lt;/script&gt;&#60;script&#62;&amp",
    f"\x00<\x00script>{RUN}</script>\x1b[31m\ud800\x08\x7f",
    f"\u202egnp.<script>{RUN}</script>\u2066\u2069\ufeff\u200b",
)


def report_of(text: str, plots: bool = False) -> ReportInput:
    """A report with the text at every place that data can reach; without plots it is made in a moment."""
    like = make_evaluation(20, shown=1)
    scores = like.scores
    if not plots:
        nothing = scores.logps * float("nan")
        scores = dataclasses.replace(scores, logps=nothing, ref_logps=nothing, distributions={})
    words = dict.fromkeys(("kind", "title", "advice"), text)
    findings = [words | {"numbers": {text: 1.0}}]
    place: dict[str, Any] = dict.fromkeys(("row", "response", "before", "token", "after"), text)
    drift: dict[str, Any] = {
        "tokens": 9,
        "shifted": 1,
        "share": 0.1,
        "top": [place | {"place": 3, "logp": -1.0, "ref_logp": -9.0}],
    }
    sample = dict.fromkeys(("prompt", "reference", "policy"), text)
    samples = [sample | {"reference_sampled": [text], "policy_sampled": [text]}]
    tokens = [make_token(text, -1.0, -2.0, 0.5, 0.6, 0.1), make_token(text)]
    shown = [make_pair("best", text, 1.0, text, tokens, tokens)]
    history: list[dict[str, Any]] = [{"step": 1, "loss": 0.5, text: 1.0}, {"step": text, "loss": text}] if plots else []
    manifest = {text: text, "more": {text: [text, text]}}
    about: dict[str, Any] = {"model": text, "reference": text, "refused": {text: 2}, text: 1.5, "text": {text: 1.5}}
    about |= {"findings": findings, "drift": drift, "samples": samples}
    evaluation = Evaluation(like.result | about, scores, shown)
    return ReportInput(text, evaluation, history, manifest, {"data": [text], text: text})
