"""The pages as MkDocs builds them: what they link to outside of docs/ is in the repository, not on the site."""

from __future__ import annotations

import re
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]*)\]\(\.\./([^)\s]+)\)")


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    """Point such links to the repository, or show their text alone where its address is not known."""
    link = rf"[\1]({config.repo_url.rstrip('/')}/blob/main/\2)" if config.repo_url else r"\1"
    return OUTSIDE.sub(link, markdown)
