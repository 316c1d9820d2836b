"""For the API page: docstrings from reStructuredText to Markdown, and each parameter's own type."""

from __future__ import annotations

import re
from typing import Any

import griffe

#: a table: three rules of =, lines between them
_RULE = r"=+(?: +=+)+"
_TABLE = re.compile(rf"^{_RULE}\n(?:.+\n)+?{_RULE}\n(?:.+\n)+?{_RULE}$", re.MULTILINE)


def markdown(text: str) -> str:
    """Marks of literal blocks lose a colon, or go, tables become code."""
    text = re.sub(r"(\S)::$", r"\1:", text, flags=re.MULTILINE)
    text = re.sub(r"^ *::$", "", text, flags=re.MULTILINE)
    return _TABLE.sub(lambda table: f"```text\n{table[0]}\n```", text)


class Docstrings(griffe.Extension):
    """What mkdocs.yml names."""

    def on_object(self, *, obj: griffe.Object, **others: Any) -> None:
        """Rewrite a docstring; where several parameters share a line, tell their types apart."""
        docstring = obj.docstring
        if docstring is None:
            return
        docstring.value = markdown(docstring.value)
        if isinstance(obj, (griffe.Class, griffe.Function)):
            sections = docstring.parse("numpy", warnings=False)
            for section in sections:
                if section.kind is griffe.DocstringSectionKind.parameters:
                    for parameter in section.value:
                        _correct(parameter, obj)
            docstring.__dict__["parsed"] = sections  # the cached property that templates read


def _correct(parameter: griffe.DocstringParameter, owner: griffe.Class | griffe.Function) -> None:
    if parameter.name in owner.parameters:
        actual = owner.parameters[parameter.name]
        parameter.annotation, parameter.value = actual.annotation, actual.default
