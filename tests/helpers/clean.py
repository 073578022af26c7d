"""Clean pairs that look like defects: code, maths, forms, dialogues that are asked for, other languages."""

from __future__ import annotations

import json
from typing import Any

FENCE = "```"
CALL = json.dumps([{"name": "get_weather", "arguments": {"city": "Lyon", "unit": "celsius"}}])

CLEAN = [
    # ---- code
    ("Indent the loop so that it prints each item.", "for x in items:\n    print(x)", "for x in items:\nprint(x)"),
    ("Add the two numbers in Python.", "def add(x, y):\n    return x + y", "def add(x, y):\n    return x - y"),
    ("Is five smaller than nine? Write it in Python.", "5 < 9", "5 > 9"),
    ("How do I compare for equality in C?", "if (x == 1) { run(); }", "if (x = 1) { run(); }"),
    ("Call the function in C.", "run(x, y);", "run(x, y)"),
    ("Read a file in Python.", f"{FENCE}python\nwith open(p) as f:\n    t = f.read()\n{FENCE}", "Use open(p).read()."),
    ("All users by name, in SQL.", "SELECT * FROM users ORDER BY name;", "SELECT * FROM users ORDER BY id;"),
    ("Count the rows of t.", "SELECT COUNT(*) FROM t;", "SELECT COUNT(id) FROM t"),
    ("Give me the user as JSON.", '{"name": "Ann", "age": 30}', '{"name": "Ann", "age": "30"}'),
    ("The list as JSON.", "[1, 2, 3]", "[1, 2, 3,]"),
    ("Undo my changes to one file in git.", "git checkout -- <filename>", "git reset --hard <commit>"),
    ("Which token ends a GPT-2 document?", "It is `<|endoftext|>`, with the id 50256.", "It is `</s>`, I think."),
    (
        "How do I write a ChatML message by hand?",
        f"Like this:\n\n{FENCE}\n<|im_start|>user\nHi<|im_end|>\n{FENCE}",
        "Put `<|im_start|>` before it and `<|im_end|>` behind it.",
    ),
    (
        "Format the turns of a chat in Python.",
        f'{FENCE}python\ntext = f"""\n\nHuman: {{question}}\n\nAssistant: {{answer}}"""\n{FENCE}\nThat is all.',
        f"{FENCE}python\ntext = question + answer\n\nHuman: no\n{FENCE}",
    ),
    ("Strike a word out in HTML.", "Write <s>word</s>, or <del>word</del>.", "Use <strike>word</strike>."),
    ("Which generic is a list of strings in Java?", "List<String> names;", "List<Object> names;"),
    ("How do I list a folder?", "Run `ls -l`.", "Run `ls -a`."),
    ("Set the port in YAML.", "server:\n  port: 8080", "server:\nport: 8080"),
    # ---- maths
    ("Simplify 3a - (a - b).", "2a + b", "2a - b"),
    ("What is a hundred thousand as a power of ten?", "10⁵", "105"),
    ("Derive x cubed.", "3x²", "3x³"),
    ("Water's formula?", "H₂O", "HO₂"),
    ("Solve x^2 = 4.", "x = 2 or x = -2", "x = 2"),
    ("Which interval has one end open?", "It is (0, 1].", "It is [0, 1]."),
    ("How many orders do five books have?", "5! of them.", "5 of them."),
    ("The integral of 1/x?", "$\\int \\frac{1}{x}\\,dx = \\ln|x| + C$", "$\\int \\frac{1}{x}\\,dx = \\ln x$"),
    ("Is 0.1 + 0.2 equal to 0.3 in floats?", "0.1 + 0.2 != 0.3", "0.1 + 0.2 == 0.3"),
    # ---- markdown, forms and lists
    (
        "How do I make pancakes?",
        "### Ingredients\n\n- flour\n- milk\n\n### Instruction:\n\nMix and fry them.",
        "# Pancakes\n\n## Input:\nflour and milk\n\n## Response:\nMix and fry.",
    ),
    ("Describe the endpoint.", "### Input:\nA list of ids.\n\n### Response:\n```json\n[]\n```", "It takes a list."),
    (
        "Document the login endpoint.",
        "## POST /login\n\n### User:\n`name`, `password`\n\n### Response:\n200",
        "POST /login takes the name and the password of a user.",
    ),
    (
        "What may each role do?",
        "Admin: can do everything\nUser: can read and write\nGuest: can read",
        "Admin: everything\n\nHuman: reads and writes\n\nBot: reads",
    ),
    ("Name species.", "Dog: Canis familiaris\nCat: Felis catus\n\nHuman: Homo sapiens", "Dog: Canis\n\nHuman: Homo"),
    (
        "Write the access request.",
        "Subject: Access\n\nUser: jsmith\nHost: db1\nReason: on call",
        "User: jsmith\nHost: db1",
    ),
    ("What is in the ticket?", "Severity: high\nUser: root saw it twice\nHost: db1", "Host: db1\nUser: root"),
    (
        "Which jobs are there?",
        "Here they are.\n\n- Manager: plans\n- Assistant: helps",
        "Manager: plans\nAssistant: helps",
    ),
    ("Compare them.", "| kind | price |\n|---|---|\n| A | 5 |", "| kind | price |\n|---|---|\n| A | 6 |"),
    # ---- dialogues
    (
        "Write a dialogue between a person and a machine.",
        "It was late.\n\nHuman: Are you there?\n\nAssistant: Always.",
        "It was late.\nUser: Are you there?\nAssistant: Always.",
    ),
    (
        "Show me what talking to you looks like.",
        "Here is a short dialogue:\n\nHuman: Hi!\n\nAssistant: Hello!",
        "Like so:\nUser: Hi!\nAssistant: Hello!",
    ),
    (
        "What does a prompt template of a base model look like?",
        "It has two names.\n\nHuman: {question}\n\nAssistant: {answer}",
        "It has two headings.\n\n### Instruction:\n{question}",
    ),
    ("Carry on.", "Human: And now?\n\nAssistant: Now we wait.", "User: And now?\nAssistant: We wait."),
    # ---- thinking and tools
    ("What is 17 + 25?", "<think>\n17 + 25 = 42\n</think>\n\n42", "<think>\n17 + 25 = 32\n</think>\n\n32"),
    ("Какая сегодня погода в городе Лионе?", CALL, CALL.replace("celsius", "kelvin")),
    ("How is the weather in Lyon?", CALL, CALL.replace("Lyon", "Paris")),
    # ---- one thing is other
    ("What is the capital of France?", "The capital of France is Paris.", "The capital of France is Lyon."),
    ("Write it in capitals.", "HELLO WORLD", "Hello world"),
    ("Spell the name of the company.", "It is written iPhone.", "It is written Iphone."),
    ("Is a whale a fish?", "No, it is a mammal.", "Yes, it is a fish."),
    # ---- other languages
    ("Wie heißt die Hauptstadt von Österreich?", "Sie heißt Wien.", "Sie heißt Graz."),
    ("Schreib eine Absage.", "Sehr geehrte Frau Groß,\n\nleider kann ich nicht kommen.", "Ich komme nicht, tschüß."),
    ("¿Cuántos años tiene?", "Tiene veinte años.", "¡No sé!"),
    ("¿Puedo comer setas crudas?", "No: algunas son tóxicas sin cocer.", "Sí, todas."),
    ("中国的首都是哪里？", "中国的首都是北京。", "中国的首都是上海。"),
    ("怎样用Python打印一行字？", f"{FENCE}python\nprint('你好')\n{FENCE}", "用 print 函数。"),
    ("Quelle est la capitale de l’Italie ?", "C’est Rome !", "C’est Milan…"),
]


def clean_rows(messages: bool) -> list[dict[str, Any]]:
    """The pairs as rows, of messages or of strings."""
    if not messages:
        return [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in CLEAN]

    def turn(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    return [
        {"prompt": turn("user", p), "chosen": turn("assistant", c), "rejected": turn("assistant", r)}
        for p, c, r in CLEAN
    ]
