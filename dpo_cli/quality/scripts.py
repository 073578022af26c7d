"""In which script a text is written, told by counting letters."""

from __future__ import annotations

import json
import re

import numpy as np
import numpy.typing as npt

# The first code point of each run of letters of one script; "" is no letter of any.
_RUNS = (
    (0x00, ""), (0x41, "Latin"), (0x5B, ""), (0x61, "Latin"), (0x7B, ""), (0xC0, "Latin"), (0x250, ""),
    (0x370, "Greek"), (0x400, "Cyrillic"), (0x530, "Armenian"), (0x590, "Hebrew"), (0x600, "Arabic"), (0x780, ""),
    (0x900, "Devanagari"), (0x980, "Bengali"), (0xA00, "Gurmukhi"), (0xA80, "Gujarati"), (0xB00, "Odia"),
    (0xB80, "Tamil"), (0xC00, "Telugu"), (0xC80, "Kannada"), (0xD00, "Malayalam"), (0xD80, "Sinhala"),
    (0xE00, "Thai"), (0xE80, "Lao"), (0xF00, "Tibetan"), (0x1000, "Burmese"), (0x10A0, "Georgian"),
    (0x1100, "Korean"), (0x1200, "Ethiopic"), (0x13A0, ""), (0x1780, "Khmer"), (0x1800, ""), (0x1E00, "Latin"),
    (0x1F00, "Greek"), (0x2000, ""), (0x2E80, "Chinese or Japanese"), (0x3000, ""), (0x3041, "Chinese or Japanese"),
    (0x3130, "Korean"), (0x3190, ""), (0x3400, "Chinese or Japanese"), (0x4DC0, ""), (0x4E00, "Chinese or Japanese"),
    (0xA000, ""), (0xAC00, "Korean"), (0xD7B0, ""), (0xF900, "Chinese or Japanese"), (0xFB00, ""),
    (0x20000, "Chinese or Japanese"), (0x32000, ""),
)  # fmt: skip
_NAMES = sorted({name for _, name in _RUNS})  # "" is the first
_STARTS = np.array([start for start, _ in _RUNS], np.uint32)
_SCRIPTS = np.array([_NAMES.index(name) for _, name in _RUNS])
_OTHER = re.compile("[\u0370-\u1dff\u1f00-\u1fff\u2e80-\ud7ff\uf900-\uffff\U00020000-\U00031fff]")  # than Latin
FEWEST, FEWEST_DENSE = 12, 8  # letters that tell a script; of those in which a letter says more
_DENSE = ("Chinese or Japanese", "Korean")
MOST = 10_000  # characters that are looked at
SHARE = 0.85  # of a text's letters that are of its script
STRAY = 4  # letters of the response's script that the prompt may have
# A prompt that asks for another language, or speaks of one written so, may well be answered in another script.
_ASKED = re.compile(
    r"translat|transliterat|traduc|traduz|traduir|übersetz|перев[её]д|перевод|翻[译譯訳]|번역|ترجم|अनुवाद|תרגם|μετάφρα"
    r"|in (?:another|my|your|their|his|her|which|what|the) language"
)
_SPOKEN_OF = {
    "Latin": r"latin|english|англ|француз|немец|испан|итал|английск|英|法语|德语|영어|الإنجليزية|अंग्रेज|אנגלית|αγγλικ"
    r"|python|sql|html|\bcode\b|програм|скрипт|код|コード|代码|编程|코드|कोड",
    "Cyrillic": r"russia|ukrain|bulgar|serbia|belarus|kazakh|mongol|cyrillic",
    "Greek": r"greek|greece",
    "Hebrew": r"hebrew|yiddish|israel",
    "Arabic": r"arab|persia|farsi|urdu|pashto|quran",
    "Devanagari": r"hindi|sanskrit|nepal|marathi|devanagari|india",
    "Thai": r"thai",
    "Korean": r"korea|hangul",
    "Chinese or Japanese": r"chinese|china|mandarin|canton|taiwan|japan|kanji|hiragana|katakana|hanzi",
}


def script_mismatch(prompt: str, chosen: str, rejected: str) -> str | None:
    """Which response is not in the prompt's script, where it might be expected to be; the chosen one first."""
    texts = [text[:MOST] for text in (prompt, chosen, rejected)]
    if not any(not text.isascii() and _OTHER.search(text) for text in texts):
        return None
    asked, letters = script(texts[0])
    prompt = texts[0].casefold()
    if asked is None or _ASKED.search(prompt):
        return None
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        answered, _ = script(response[:MOST])
        if answered is None or answered == asked or "```" in response or is_json(response):
            continue
        if re.search(_SPOKEN_OF.get(answered, answered.casefold()), prompt):
            continue
        if answered == "Latin" or letters[_NAMES.index(answered)] <= STRAY:
            return f"prompt {asked}, {name} {answered}"
    return None


def is_json(text: str) -> bool:
    """Whether a text is an object or a list of JSON, as calls of tools are."""
    try:
        return text.lstrip()[:1] in ("{", "[") and json.loads(text) is not None
    except (ValueError, RecursionError):
        return False


def script(text: str) -> tuple[str | None, npt.NDArray[np.int64]]:
    """The script in which nearly all of a text is, if it is long enough to tell; and its letters of each."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    counts = np.bincount(_SCRIPTS[np.searchsorted(_STARTS, codes, "right") - 1], minlength=len(_NAMES))
    counts[0] = 0
    most = int(counts.argmax())
    enough = counts[most] >= (FEWEST_DENSE if _NAMES[most] in _DENSE else FEWEST)
    return (_NAMES[most] if enough and counts[most] >= SHARE * counts.sum() else None), counts
